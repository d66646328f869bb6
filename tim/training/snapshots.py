"""Checkpoint folders that are either complete or ignored."""

import json
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from tim.checks import whole
from tim.files import sync

_MARKER = "COMPLETE"  # holds the size of every file
_NAME = re.compile(r"step-(\d+)")


class Damaged(ValueError):
    """A checkpoint that was complete is not whole any more; the message says what of it."""


def complete(root: Path) -> dict[int, Path]:
    """The complete checkpoints under `root`: step → folder, ascending."""
    found = {
        int(match[1]): folder
        for folder in root.glob("step-*")
        if (match := _NAME.fullmatch(folder.name)) and (folder / _MARKER).is_file()
    }
    return dict(sorted(found.items()))


def save(
    root: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep: int,
    keep_steps: Collection[int] = (),
) -> Path:
    """Have `write` fill a checkpoint folder for `step`, then delete the oldest beyond `keep`.

    The folder is filled under a temporary name and renamed when its completion marker is in it;
    only then are older checkpoints deleted, save those of `keep_steps`. If `write` fails, what it
    wrote is deleted.
    """
    keep = whole("keep", keep, 1)
    partial = begin(root, step)
    try:
        write(partial)
        return finish(root, step, keep=keep, keep_steps=keep_steps)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def begin(root: Path, step: int) -> Path:
    """An empty folder to fill; `finish` makes a checkpoint of it."""
    for stale in root.glob("partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = partial_folder(root, step)
    partial.mkdir(parents=True)
    return partial


def partial_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is filled."""
    return root / f"partial-{whole('step', step, 0):08d}"


def finish(root: Path, step: int, *, keep: int, keep_steps: Collection[int] = ()) -> Path:
    """Complete what `begin` began, then delete the oldest checkpoints as `save` says."""
    partial, final = partial_folder(root, step), root / f"step-{step:08d}"
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in sync(partial)}
    (partial / _MARKER).write_text(json.dumps({"files": sizes}))
    sync(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)

    removable = [path for at, path in complete(root).items() if at not in keep_steps]
    for old in removable[:-keep]:
        (old / _MARKER).unlink()
        shutil.rmtree(old)
    return final


def check(folder: Path) -> None:
    """Compare a checkpoint's files with what its marker says of them; early ones say nothing.

    Raises:
        Damaged: one is missing or of another size.
    """
    try:
        sizes = json.loads((folder / _MARKER).read_text() or "{}").get("files", {})
    except (ValueError, AttributeError):
        raise Damaged(f"{folder} is damaged: its {_MARKER} is no JSON") from None
    for name, size in sizes.items():
        path = folder / name
        has = path.stat().st_size if path.is_file() else None
        if has != size:
            wrong = "is missing" if has is None else f"has {has} bytes, not {size}"
            raise Damaged(f"{folder} is damaged: {name} {wrong}")


def set_aside(folder: Path) -> Path:
    """Take a damaged checkpoint out of the run's way, without deleting anything."""
    place, count = folder.with_name(f"damaged-{folder.name}"), 1
    while place.exists():
        place, count = folder.with_name(f"damaged-{folder.name}.{count}"), count + 1
    folder.rename(place)
    return place
