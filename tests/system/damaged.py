"""What becomes of pictures: cut off, of another mode."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def as_mode(mode: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with Image.open(path) as image:
            changed = image.convert(mode)
        changed.save(path)

    return change
