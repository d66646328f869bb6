"""What a picture was drawn with, kept in the picture itself."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from safetensors import SafetensorError, safe_open

KEY = "tim"  # of the PNG's tEXt chunk, or of the metadata of a .safetensors


def written(record: dict[str, Any]) -> dict[str, str]:
    """As the metadata of a `.safetensors`."""
    return {KEY: json.dumps(record)}


def save(picture: Image.Image, path: Path, record: dict[str, Any]) -> None:
    """As a PNG."""
    info = PngImagePlugin.PngInfo()
    for key, text in written(record).items():
        info.add_text(key, text)
    picture.save(path, format="PNG", pnginfo=info)


def read(path: Path) -> dict[str, Any]:
    """The record of a picture, or of a `.safetensors`, that `tim sample` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no record.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}")
    try:
        record = json.loads(_text(path))
        parts = record["settings"], record["weights"], record["made_with"]["versions"]
        if all(isinstance(part, dict) for part in parts):
            return record
    except (ValueError, TypeError, KeyError, SafetensorError, UnidentifiedImageError, OSError):
        pass
    raise ValueError(f"{path} holds no settings of tim sample: a PNG that it wrote is needed")


def _text(path: Path) -> str:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return file.metadata()[KEY]
    with Image.open(path) as picture:
        return picture.info[KEY]
