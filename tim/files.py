"""Files that appear whole, and a folder that one process at a time writes to."""

import contextlib
import fcntl
import functools
import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def filling(folder: str | Path) -> Iterator[Path]:
    """A new folder of the same name, whose files move into `folder` at the end.

    Each is on the disk before it takes its place, at once; whoever has the file that was there open
    or mapped keeps it. An error moves nothing.
    """
    folder = Path(os.path.abspath(folder))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as parent:
        new = Path(parent, folder.name)
        new.mkdir(exist_ok=True)
        yield new
        for file in sync(new):
            place = folder / file.relative_to(new)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` at the end, as `filling` does."""
    path = Path(os.path.abspath(path))
    with filling(path.parent) as folder:
        yield folder / path.name


def sync(folder: Path) -> list[Path]:
    """The files under `folder`, each of them on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return files


def saved_whole(cls: type[T]) -> type[T]:
    """A class of diffusers whose `save_pretrained` writes no file in place: weights may be mapped
    from the very file. When all are written, they replace those of the folder."""
    save = cls.save_pretrained

    @functools.wraps(save)  # diffusers reads its signature
    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        with filling(save_directory) as folder:
            save(self, str(folder), *args, **options)
            _remove_old_shards(Path(save_directory), folder)

    cls.save_pretrained = save_pretrained
    return cls


def _remove_old_shards(old: Path, new: Path) -> None:
    """An index of shards is read before a file of all weights: that of an earlier save must go."""
    written = {path.relative_to(new) for path in new.rglob("*") if path.is_file()}
    for path in written:
        name = re.sub(r"-\d{5}-of-\d{5}", "", path.name)
        if name.endswith((".safetensors", ".bin")):
            stem, *variant, kind = name.split(".")
            index = ".".join((stem, kind, "index", *variant, "json"))
            shards = ".".join((stem, *variant)) + f"-?????-of-?????.{kind}"
            for pattern in (index, shards):
                for other in (old / path.parent).glob(pattern):
                    if other.relative_to(old) not in written:
                        other.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder` by a lock (flock) that ends with this one, however it
    ends. Where the file system has none, a warning is all.

    Raises:
        BlockingIOError: another process is in it; the message says which.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BlockingIOError(f"{folder} is being written to by {holder}") from None
        except OSError as error:
            _log.warning(
                "%s has no locks (%s): see to it that no other process writes there",
                folder, error.strerror,
            )  # fmt: skip
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
