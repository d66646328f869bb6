"""Judging a folder of pictures: what cannot be judged is named, the work is shared and resumes."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from tqdm import tqdm

from tim.data.base import UnreadableError
from tim.data.files import some
from tim.evaluation.reading import ahead, picture
from tim.files import locked
from tim.processes import Processes

_WORK = "judged"  # what is done, in a result's folder
_READERS = 4  # threads


@contextmanager
def output_folder(folder: str | Path) -> Iterator[Path]:
    """The folder of a result, made if need be; one run at a time writes to it.

    Raises:
        BlockingIOError: another run does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) if Processes.here().is_first else nullcontext():
        yield folder


def refuse(folder: Path, problems: Sequence[str], wanted: str) -> None:
    """Raises:
    ValueError: there are problems; it names the first and says how many there are.
    """
    if problems:
        raise ValueError(
            f"{folder} must hold {wanted}: {some(problems)} ({len(problems)} in all); "
            "--leave-out judges what there is and counts the rest"
        )


def without_damaged(
    pictures: Mapping[str, Path], check: Callable[[Image.Image], str | None] = lambda _: None
) -> tuple[dict[str, Path], list[str]]:
    """The pictures that are whole and RGB, and why the others are left out, a line each.

    Each process looks at a share; all get the whole answer. `check` may find further faults.
    """

    def fault(name: str) -> tuple[str, str] | None:
        try:
            reason = check(picture(pictures[name]))
        except UnreadableError as error:
            return name, f"{pictures[name]}: {error.__cause__ or error}"
        return (name, f"{pictures[name]}: {reason}") if reason else None

    here = Processes.here()
    share = list(pictures)[here.rank :: here.world_size]
    with ThreadPoolExecutor() as pool:
        found = pool.map(fault, share)
        bar = tqdm(found, "reading", len(share), unit=" pictures", disable=not here.is_first)
        mine = dict(filter(None, bar))
    faults = {name: line for part in here.gather(mine) for name, line in part.items()}
    whole = {name: path for name, path in pictures.items() if name not in faults}
    return whole, [faults[name] for name in pictures if name in faults]


def judged(
    pictures: Mapping[str, Path],
    judge: Callable[[str, Image.Image], Any],
    output: Path,
    settings: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """What `judge(name, picture)` says of each picture, by its name, in the order given, and where
    what a network computed was not finite (FloatingPointError), a line each.

    Every process of torch.distributed's default group takes a share. Each judgement, anything that
    JSON holds, is on the disk in `output/judged` before the next begins: a run that was stopped
    goes on, by as many processes as there are then. A judgement is taken from there only if the
    file (its size and time) and the settings are the same.
    """
    here, folder = Processes.here(), output / _WORK
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    stamps = {name: _stamp(path, digest) for name, path in pictures.items()}
    known = here.gather(_known(folder, stamps) if here.is_first else None)[0]
    todo = [name for name in pictures if name not in known]
    share, done, faults = todo[here.rank :: here.world_size], {}, {}
    with _appending(folder / f"process-{here.rank}.jsonl") as file:
        images = ahead(lambda name: picture(pictures[name]), share, _READERS, 2 * _READERS)
        bar = tqdm(share, "judging", unit=" pictures", disable=not here.is_first)
        for name, image in zip(bar, images, strict=True):
            try:
                done[name] = judge(name, image)
            except FloatingPointError as error:
                faults[name] = f"{pictures[name]}: {error}"
                continue
            _write(file, {"picture": name, "stamp": stamps[name], "judgement": done[name]})
    for new, wrong in here.gather((done, faults)):
        known.update(new)
        faults.update(wrong)
    found = {name: known[name] for name in pictures if name in known}
    return found, [faults[name] for name in pictures if name in faults]


def _stamp(path: Path, settings: str) -> list[Any]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, settings]


def _known(folder: Path, stamps: Mapping[str, list[Any]]) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob("process-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                kept = json.loads(line)
                if stamps.get(kept["picture"]) == kept["stamp"]:
                    found[kept["picture"]] = kept["judgement"]
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill: judged again
    return found


@contextmanager
def _appending(path: Path) -> Iterator[TextIO]:
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a torn line stays alone
                file.write(b"\n")
    with path.open("a", encoding="utf-8") as text:
        yield text


def _write(file: TextIO, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()
    os.fsync(file.fileno())
