"""Pictures from files, as every evaluation takes them."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL import Image

from tim.data.base import reading
from tim.data.prompts import PAGE

S, T = TypeVar("S"), TypeVar("T")
_CONVERTIBLE = {"1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr"}  # RGB holds their 8 bits


def picture(path: str | Path, *, convert: bool = False) -> Image.Image:
    """The RGB picture in a file, whole.

    Args:
        convert: grey, palette, transparent and CMYK pictures become RGB, transparency dropped.

    Raises:
        UnreadableError: there is no such file, it is no picture, cut off, or not RGB.
    """
    with reading(path), Image.open(path) as image:
        image.load()
        if image.mode == "RGB":
            return image
        if not convert or image.mode not in _CONVERTIBLE:
            raise ValueError(f"it is {image.mode}, not RGB")
        return image.convert("RGB")


def pictures_folder(path: str | Path) -> Path:
    """Raises:
    FileNotFoundError: there is no such folder.
    ValueError: pictures of several runs of `tim generate` are in it, each in a folder of its own.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path} of pictures: see {PAGE}")
    if runs := sorted(path.glob("*/run.json")):
        raise ValueError(
            f"{path} holds {len(runs)} folders of tim generate: give one, such as {runs[0].parent}"
        )
    return path


def ahead(
    function: Callable[[S], T], items: Iterable[S], threads: int, most: int = 64
) -> Iterator[T]:
    """The function of each item, in order; threads work out so many before they are needed."""
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque(pool.submit(function, each) for each in itertools.islice(items, most))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, each) for each in itertools.islice(items, 1))
        finally:
            for future in waiting:
                future.cancel()
