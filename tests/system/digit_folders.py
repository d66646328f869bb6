"""Real pictures of many sizes: MNIST digits cut to their boxes, 20×20, 20×15, 17×20, …"""

from pathlib import Path

import numpy as np
from PIL import Image

from tim.data import mnist


def save_digits(folder: Path, per_class: int = 400) -> int:
    """The first of each class as `folder/digit/number.png`, in RGB; how many pictures there are."""
    images, labels = mnist.load("train")
    levels = ((images[:, 0] + 1) * 127.5).round().byte().numpy()
    for digit in range(mnist.NUM_CLASSES):
        (folder / str(digit)).mkdir(parents=True)
        for number, image in enumerate(levels[labels.numpy() == digit][:per_class]):
            rows, columns = (np.flatnonzero(image.any(axis=axis)) for axis in (1, 0))
            box = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            Image.fromarray(box).convert("RGB").save(folder / f"{digit}/{number:03}.png")
    return mnist.NUM_CLASSES * min(per_class, mnist.TRAIN_PER_CLASS)
