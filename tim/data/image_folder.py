"""Pictures in class folders, without latents."""

from pathlib import Path

import numpy as np
import torch

from tim.checks import whole
from tim.data import pictures
from tim.data.base import Item, TrainingSet, is_mirrored
from tim.data.files import Names, class_pictures, existing


class ImageFolder(TrainingSet):
    """A folder of class folders of pictures; a label is the place of the sorted folder.

    Args:
        image_dir: pictures are read upright, in any depth of a class folder.
        image_size: side S of the square that is cut out of the middle, in px.
        flip: mirror every other picture at random.

    Items: image (3, S, S) float32 in [-1, 1], label () int64.

    Raises:
        ValueError: `image_dir` is no such folder, or `image_size` is not positive.

    Example:
        >>> ImageFolder("pictures", 64)[0]["image"].shape  # pictures/cat/1.jpg, …
        torch.Size([3, 64, 64])
    """

    names = ("image", "label")

    def __init__(self, image_dir: str | Path, image_size: int, *, flip: bool = True):
        self.image_dir = existing("image_dir", image_dir, "folder")
        self.image_size, self.flip = whole("image_size", image_size, 1), flip
        if not isinstance(flip, bool):
            raise ValueError(f"flip must be true or false, got {flip!r}")
        found = class_pictures(self.image_dir)
        self.classes, self.num_classes = list(found), len(found)
        self._files = Names(file for files in found.values() for file in files)
        self._labels = np.repeat(np.arange(len(found)), [len(files) for files in found.values()])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Item:
        image = pictures.read(self.image_dir / self._files[index], upright=True)
        image = pictures.centre_crop(image, self.image_size)
        is_flipped = self.flip and is_mirrored(index)
        return {
            "image": pictures.to_tensor(image, mirrored=is_flipped),
            "label": torch.tensor(int(self._labels[index])),
        }
