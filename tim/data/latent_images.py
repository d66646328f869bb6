"""Latents made beforehand, of one size, beside their pictures."""

import contextlib
import math
import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tim.checks import whole
from tim.data import pictures
from tim.data.base import Item, TrainingSet, UnreadableError, is_mirrored, reading
from tim.data.files import Names, class_pictures, existing, some


class LatentImages(TrainingSet):
    """Class folders of latents, and of the pictures they were made of.

    The latent of `image_dir/cat/1.x.jpg` is `latent_dir/cat/1.safetensors`: `latent` (2, C, h, w),
    the picture's and that of its mirror image, scaled; `label`, a whole number of any dtype. A draw
    takes either, and the picture with it. Pictures are not turned as their camera says.

    Args:
        image_size: side S of the square that is cut out of the middle of the picture, in px.

    Items: latent (C, h, w) float32, image (3, S, S) float32 in [-1, 1], label () int64.

    Raises:
        ValueError: a folder is none, pictures have no latent (the first are named), or
            `image_size` is not positive.

    Example:
        >>> data = LatentImages("datasets/imagenet1k/sd-vae-ft-ema-256x256", "imagenet/train", 256)
        >>> data[0]["latent"].shape
        torch.Size([4, 32, 32])
    """

    names = ("latent", "image", "label")

    def __init__(self, latent_dir: str | Path, image_dir: str | Path, image_size: int):
        self.latent_dir = existing("latent_dir", latent_dir, "folder")
        self.image_dir = existing("image_dir", image_dir, "folder")
        self.image_size = whole("image_size", image_size, 1)
        found = class_pictures(self.image_dir)
        _check_latents(self.latent_dir, found)
        self._files = Names(file for files in found.values() for file in files)
        # Labels grow with the sorted folders, of which there may be fewer than classes.
        latent, label = _first(self.latent_dir, list(found.values())[-1])
        self.num_classes, self._size = int(label) + 1, tuple(latent.shape[1:])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Item:
        name = self._files[index]
        is_flipped = is_mirrored(index)
        path = self.latent_dir / latent_file(name)
        latent, label = read_latent(path, is_flipped, self.num_classes, self._size)
        image = pictures.centre_crop(pictures.read(self.image_dir / name), self.image_size)
        image = pictures.to_tensor(image, mirrored=is_flipped)
        return {"latent": latent, "image": image, "label": label}


def latent_file(image_file: str) -> str:
    """A latent's path: that of its picture up to the first dot of the name."""
    where, name = os.path.split(image_file)
    return os.path.join(where, f"{name.partition('.')[0]}.safetensors")


def latent_files(name: str, files: list[str]) -> list[str]:
    """The latents of the pictures of class `name`.

    Raises:
        ValueError: two would have one.
    """
    latents = [latent_file(file) for file in files]
    if len({*latents}) < len(latents):
        raise ValueError(
            f"pictures of class {name} have one name up to the first dot, hence one latent"
        )
    return latents


def read_latent(
    path: Path, mirrored: bool, num_classes: int | None, size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """The latent (C, h, w) float32 of the picture or its mirror image, and the label () int64.

    Raises:
        UnreadableError: the file is missing, damaged or of another form, or not of `size`.
    """
    with reading(path), safe_open(path, "pt") as file:
        rows, label = file.get_slice("latent"), file.get_tensor("label")
        shape = tuple(rows.get_shape())
        if len(shape) != 4 or shape[0] != 2 or shape[2:] != (size or shape[2:]):
            h, w = size or ("h", "w")
            raise ValueError(f"latent must have shape (2, C, {h}, {w}), got {shape}")
        number = label.item() if label.numel() == 1 else None
        if number is None or number != int(number) or not 0 <= number < (num_classes or math.inf):
            below = f" below {num_classes}" if num_classes else ""
            raise ValueError(f"label must be a whole number{below}, got {label.tolist()}")
        return rows[int(mirrored)].float(), torch.tensor(int(number))


def _first(latent_dir: Path, files: list[str]) -> tuple[Tensor, Tensor]:
    """The first of the pictures' latents that can be read, and its label."""
    for file in files:
        with contextlib.suppress(UnreadableError):
            return read_latent(latent_dir / latent_file(file), False, None)
    raise ValueError(f"latent_dir {latent_dir}: none of the latents can be read of {some(files)}")


def _check_latents(latent_dir: Path, found: dict[str, list[str]]) -> None:
    """Every picture has a latent of its own; a folder is listed once."""
    missing, listed = [], {}
    for name, files in found.items():
        for file, latent in zip(files, latent_files(name, files), strict=True):
            where = os.path.dirname(latent)
            if where not in listed:
                is_there = (latent_dir / where).is_dir()
                listed = {where: {*os.listdir(latent_dir / where)} if is_there else set()}
            if os.path.basename(latent) not in listed[where]:
                missing.append(file)
    if missing:
        total = sum(map(len, found.values()))
        raise ValueError(
            f"latent_dir {latent_dir} has no latent of {len(missing):,} of {total:,} pictures: "
            f"{some(missing)}"
        )
