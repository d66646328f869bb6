"""Checkpoint folders that are either complete or ignored."""

import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from tim.checks import whole
from tim.files import sync

_MARKER = "COMPLETE"
_NAME = re.compile(r"step-(\d+)")


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
    only then are older checkpoints deleted, save those of `keep_steps`.
    """
    step, keep = whole("step", step, 0), whole("keep", keep, 1)
    final, partial = root / f"step-{step:08d}", root / f"partial-{step:08d}"
    for stale in (*root.glob("partial-*"), final):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    sync(partial)
    (partial / _MARKER).touch()
    partial.rename(final)

    removable = [path for at, path in complete(root).items() if at not in keep_steps]
    for old in removable[:-keep]:
        (old / _MARKER).unlink()
        shutil.rmtree(old)
    return final
