"""Pictures as a judge sees them."""

from pathlib import Path

from PIL import Image

from tim.data.base import reading


def picture(path: str | Path) -> Image.Image:
    """The RGB picture in a file, whole.

    Raises:
        UnreadableError: there is no such file, or it is no picture or cut off.
        ValueError: it is not RGB.
    """
    with reading(path), Image.open(path) as image:
        image.load()
        mode, rgb = image.mode, image.convert("RGB")
    if mode != "RGB":
        raise ValueError(f"{path}: RGB is needed, the picture is {mode}")
    return rgb
