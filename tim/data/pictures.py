"""Pictures from files, at the published sizes: a centred square, or whole multiples of a unit."""

from math import floor, sqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tim.checks import whole
from tim.data.base import reading

# Camera data (EXIF) may turn a picture. Released latents are of pictures as they are stored.


def read(path: str | Path, *, upright: bool = False, on_white: bool = False) -> Image.Image:
    """The picture in RGB; `upright` turns it as its camera says, and what is transparent shows
    white with `on_white`, else whatever lies under it.

    Raises:
        UnreadableError: the file is missing or is no whole picture.
    """
    with reading(path), Image.open(path) as image:
        is_deep = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")
        image = ImageOps.exif_transpose(image) if upright else image
        if is_deep:
            levels = np.rint(np.asarray(image) / 257)  # of 16 bits, which Pillow would cut off
            image = Image.fromarray(levels.astype(np.uint8))
        if on_white and image.has_transparency_data:
            canvas = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(canvas, image.convert("RGBA"))
        return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle size × size of the picture scaled to that short side, as ADM (2105.05233) does.

    Halved by boxes while it is at least twice as large, then bicubic.
    """
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = stretched(image, *(round(side * scale) for side in image.size))
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def native_size(width: int, height: int, *, unit: int = 32, most: int = 2048) -> tuple[int, int]:
    """(width, height) at native resolution, in px: multiples of `unit`, of an area up to most².

    Sides are cut to a multiple; a larger picture is first scaled to the area. One unit at least.

    Example:
        >>> native_size(500, 375)
        (480, 352)
    """
    width, height = whole("width", width, 1), whole("height", height, 1)
    unit, most = whole("unit", unit, 1), whole("most", most, 1)
    w, h = float(width), float(height)
    if width * height >= most**2:
        w = sqrt(width / height) * most
        h = w * height / width
    return max(1, floor(w / unit)) * unit, max(1, floor(h / unit)) * unit


def stretched(image: Image.Image, width: int, height: int) -> Image.Image:
    """At exactly that size, bicubic; nothing is cut off."""
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image, *, mirrored: bool = False) -> Tensor:
    """The picture, or its mirror image, as (3, H, W) float32 in [-1, 1]."""
    levels = torch.from_numpy(np.array(ImageOps.mirror(image) if mirrored else image))
    return (levels.movedim(-1, 0).contiguous().float() / 255 - 0.5) / 0.5
