"""Pictures to measure, in a fixed order: a folder, an npz file, or whatever yields them."""

import hashlib
import itertools
import json
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tim.data.base import UnreadableError, reading
from tim.data.files import some
from tim.data.prompts import PAGE
from tim.evaluation.reading import ahead, picture, pictures_folder

_log = logging.getLogger(__name__)
_THREADS = 8
_KINDS = Image.registered_extensions()
_ALONGSIDE = {"run.json"}  # what `tim generate` leaves beside its pictures


class Bad(NamedTuple):
    """A picture that cannot be measured, and why."""

    name: str
    reason: str


class Pictures(Protocol):
    """Named pictures in a fixed order."""

    names: Sequence[str]

    def stamp(self, start: int, stop: int) -> str | None:
        """What these pictures are, another text if one of them changed; None if nobody knows."""

    def read(self, places: Iterable[int]) -> Iterator[Tensor | Bad]:
        """Those at ascending places, uint8 (3, H, W)."""


class Folder:
    """The pictures below a folder, in the numeric order of their paths from it (2.png, 10.png).

    Args:
        convert: grey, palette, transparent and CMYK pictures become RGB, transparency dropped;
            else they are bad.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no picture, or folders of several runs.
    """

    def __init__(self, path: str | Path, *, convert: bool = False):
        self.path, self.convert = pictures_folder(path), convert
        found, others = [], []
        for where, folders, files in os.walk(self.path, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                if name.startswith(".") or name in _ALONGSIDE:
                    continue
                is_picture = _KINDS.get(os.path.splitext(name)[1].lower()) in Image.OPEN
                full = os.path.relpath(os.path.join(where, name), self.path)
                (found if is_picture else others).append(full)
        if others:
            _log.warning("%s: not pictures: %s", path, some(sorted(others)))
        if not found:
            raise ValueError(f"the folder {path} holds no pictures")
        self.names = sorted(found, key=_numeric)

    def stamp(self, start: int, stop: int) -> str:
        files = [(name, os.stat(self.path / name)) for name in self.names[start:stop]]
        facts = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
        return json.dumps([self.convert, facts])

    def read(self, places: Iterable[int]) -> Iterator[Tensor | Bad]:
        return ahead(self._read, places, _THREADS)

    def _read(self, place: int) -> Tensor | Bad:
        name = self.names[place]
        try:
            levels = np.array(picture(self.path / name, convert=self.convert))
        except UnreadableError as error:
            return Bad(name, str(error.__cause__ or error))
        return torch.from_numpy(levels).movedim(-1, 0)


class Npz:
    """`arr_0` of an npz file, uint8 (N, H, W, 3), read row by row and never as a whole.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no such array, or an empty one.
    """

    def __init__(self, path: str | Path):
        self.path = npz_file(path)
        with zipfile.ZipFile(self.path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise ValueError(f"{path} holds no arr_0: pictures uint8 (N, H, W, 3) are needed")
            with archive.open("arr_0.npy") as member:
                self._shape, self._start = self._header(member)
        self.names = [f"arr_0[{place}]" for place in range(self._shape[0])]

    def _header(self, member) -> tuple[tuple[int, ...], int]:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(member)
        is_pictures = len(shape) == 4 and shape[-1] == 3 and dtype == np.uint8 and min(shape)
        if not is_pictures or is_fortran:
            raise ValueError(
                f"arr_0 of {self.path} must be uint8 (N, H, W, 3), row after row; "
                f"got {dtype} {shape}{' by columns' if is_fortran else ''}"
            )
        return shape, member.tell()

    def stamp(self, start: int, stop: int) -> str:
        status = self.path.stat()
        where = str(self.path.resolve())
        return json.dumps([where, status.st_size, status.st_mtime_ns, start, stop])

    def read(self, places: Iterable[int]) -> Iterator[Tensor | Bad]:
        size = int(np.prod(self._shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:

            def row(place: int) -> Tensor:
                member.seek(self._start + place * size)
                with reading(self.path):
                    content = member.read(size)
                    picture = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                    return picture.view(self._shape[1:]).movedim(-1, 0)

            yield from ahead(row, places, 1)  # one thread: the member has one place


class Stream:
    """Pictures that something yields: uint8 (3, H, W), or batches (n, 3, H, W), `count` in all.

    Of several processes each must be given the same; each measures its share.
    """

    def __init__(self, pictures: Iterable[Tensor], count: int):
        self._pictures = pictures
        self.names = [f"picture {place}" for place in range(count)]

    def stamp(self, start: int, stop: int) -> str | None:
        return None

    def read(self, places: Iterable[int]) -> Iterator[Tensor | Bad]:
        every = itertools.chain.from_iterable(map(self._batch, self._pictures))
        at = -1
        for place in places:
            for each in itertools.islice(every, place - at - 1, None):
                yield each
                break
            else:
                raise ValueError(f"fewer pictures than asked: {len(self.names)} are needed")
            at = place

    @staticmethod
    def _batch(pictures: Tensor) -> Tensor:
        fits = isinstance(pictures, Tensor) and pictures.dtype == torch.uint8
        if not fits or pictures.ndim not in (3, 4) or pictures.shape[-3] != 3:
            what = getattr(pictures, "shape", type(pictures).__name__)
            raise ValueError(f"pictures must be uint8 (3, H, W) or (n, 3, H, W), got {what}")
        return pictures if pictures.ndim == 4 else pictures[None]


def npz_file(path: str | Path) -> Path:
    """Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no npz.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}: see {PAGE}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no npz file, or one that was cut off")
    return Path(path)


def npz_checksum(path: str | Path) -> str:
    """CRC-32 of the names and contents of an npz file's arrays, which it keeps of each."""
    with zipfile.ZipFile(path) as archive:
        parts = sorted((info.filename, info.CRC) for info in archive.infolist())
    return f"{zlib.crc32(json.dumps(parts).encode()):08x}"


def enough(pictures: Pictures, count: int, where: object) -> None:
    """Raises:
    ValueError: there are fewer.
    """
    if len(pictures.names) < count:
        raise ValueError(
            f"fewer pictures than asked: {where} holds {len(pictures.names):,} of {count:,}"
        )


def opened(given: "str | Path | Pictures | Iterable[Tensor]", count: int, **options) -> Pictures:
    """A folder, a .npz, or what yields `count` pictures.

    Raises:
        ValueError: there are fewer than `count`.
    """
    if isinstance(given, (str, os.PathLike)):
        is_npz = Path(given).suffix.lower() == ".npz"
        found: Pictures = Npz(given) if is_npz else Folder(given, **options)
    else:
        found = given if hasattr(given, "stamp") else Stream(given, count)
    enough(found, count, given if isinstance(given, (str, os.PathLike)) else type(given).__name__)
    return found


def key_of(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _numeric(name: str) -> list[tuple[int, int | str]]:
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts] + [(1, name)]
