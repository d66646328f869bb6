"""Lists of files and lines that stay small in memory and in the processes that load data."""

import json
import logging
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from tim.checks import some

_log = logging.getLogger(__name__)


def existing(name: str, given: str | Path, kind: Literal["folder", "file"]) -> Path:
    """Raises:
    ValueError: there is no such thing.
    """
    is_path = isinstance(given, (str, os.PathLike))
    if not is_path or not (Path(given).is_dir() if kind == "folder" else Path(given).is_file()):
        raise ValueError(f"{name} must be a {kind}, got {str(given) if is_path else given!r}")
    return Path(given)


class Names(Sequence[str]):
    """File names in one block of memory: reading a list of str would copy it, page by page, into
    every process."""

    def __init__(self, names: Iterable[str]):
        self._bytes = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self._bytes)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[index])


class JsonLines(Sequence[dict[str, Any]]):
    """The objects of a file with one a line, read when they are asked for.

    Args:
        check: called once with every object; the numbers that it returns are a row of `checked`.

    Raises:
        ValueError: a line is no JSON object, or `check` refuses it; the message names it.
    """

    def __init__(self, path: str | Path, check: Callable[[dict[str, Any]], tuple[int, ...]]):
        self.path = existing("jsonl_dir", path, "file")
        starts, checked = array("q"), array("q")
        with self.path.open("rb") as file:
            while line := file.readline():
                starts.append(file.tell() - len(line))
                try:
                    checked.extend(check(json.loads(line)))
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    reason = f"no {error}" if isinstance(error, KeyError) else error
                    raise ValueError(f"{path}, line {len(starts)}: {reason}") from error
        if not starts:
            raise ValueError(f"{path} is empty")
        self._starts = np.array(starts)
        self.checked = np.array(checked).reshape(len(starts), -1)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = int(self._starts[index])
        with self.path.open("rb") as file:
            file.seek(start)
            return json.loads(file.readline())


class Packs(Sequence[list[int]]):
    """Batches of line numbers, of a JSON list of lists.

    Raises:
        ValueError: it is something else, a batch is empty, or a number is not below `num_lines`.
    """

    def __init__(self, path: str | Path, num_lines: int):
        content = existing("packed_json", path, "file").read_bytes()
        try:
            packs = json.loads(content)
            self._ends = np.cumsum([len(pack) for pack in packs])
            self._lines = np.array([line for pack in packs for line in pack])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} must be a list of lists of line numbers: {error}") from error
        if self._lines.dtype != int or self._lines.ndim != 1 or not all(packs):
            raise ValueError(f"{path} must be a list of lists of line numbers, none empty")
        if not 0 <= self._lines.min() <= self._lines.max() < num_lines:
            wrong = self._lines[(self._lines < 0) | (self._lines >= num_lines)][0]
            raise ValueError(f"{path} names line {wrong}; there are {num_lines}, from 0 on")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> list[int]:
        end = self._ends[index]
        start = self._ends[index - 1] if index % len(self) else 0
        return self._lines[start:end].tolist()


def pictures_under(folder: Path, root: Path) -> tuple[list[str], list[str]]:
    """Pictures in any depth, by the ends of their names, and other files: sorted paths from `root`.
    Hidden files are passed over."""
    kinds = Image.registered_extensions()
    found, others = [], []
    for where, _, files in os.walk(folder, followlinks=True):
        prefix = os.path.relpath(where, root)
        for file in files:
            if file.startswith("."):
                continue
            kind = kinds.get(os.path.splitext(file)[1].lower())
            name = os.path.normpath(f"{prefix}/{file}")
            (found if kind in Image.OPEN else others).append(name)
    return sorted(found), sorted(others)


def class_pictures(root: Path) -> dict[str, list[str]]:
    """The pictures under each class folder of `root` by the folder's name, as paths from `root`.

    Folders and pictures are sorted. Hidden files and plain files of `root` are passed over, and
    with a warning files whose name is not that of a picture.

    Raises:
        ValueError: there is no class folder, or one without pictures.
    """
    others, found = [], {}
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    for name in names:
        if name.startswith("."):
            continue
        found[name], odd = pictures_under(root / name, root)
        others += odd
    if others:
        _log.warning("%s: not pictures: %s", root, some(others))
    empty = [name for name, files in found.items() if not files]
    if empty or not found:
        what = f"no pictures in {some(empty)}" if found else "no class folders"
        raise ValueError(f"image_dir must be a folder of class folders; {root} has {what}")
    return found
