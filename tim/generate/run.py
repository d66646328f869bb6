"""A benchmark's folder of pictures, drawn by as many processes as there are."""

import contextlib
import copy
import os
import shutil
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from tim.data.prompts import Prompt
from tim.files import filling, locked
from tim.generate.benchmarks import Benchmark
from tim.generate.drawing import Drawer, Picture, arithmetic
from tim.generate.record import record
from tim.generate.settings import folder_name
from tim.generate.sources import Source
from tim.processes import Processes
from tim.training.signals import noted

_WRITERS = 4  # threads, each process
_SUFFIXES = (".png", ".jpg", ".jpeg", ".safetensors")  # of what is made of pictures


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; what was drawn is written."""

    def __init__(self, number: int, folder: Path):
        name = signal.Signals(number).name
        super().__init__(f"{name} stopped the run, what it has drawn is in {folder}")
        self.exit_code = 128 + number


def generate(benchmark: Benchmark, source: Source, output: str | Path) -> Path:
    """Draw what is not there yet of a benchmark's pictures, and return their folder.

    The folder, of the published name, lies in `output`, and `run.json` in it says what the pictures
    depend on. Each depends on the seed, its item and its number alone: not on how many processes
    share the work (every one of torch.distributed's default group takes its share), on the batch
    size, or on what was there before. Files appear whole.

    Raises:
        ValueError: settings or networks do not fit, or the folder holds other pictures.
        BlockingIOError: another run writes to the folder.
        FloatingPointError: what a network computes is not finite; the picture is named.
        OSError: a file cannot be written. The others are whole.
        Interrupted: SIGINT or SIGTERM came. What was drawn is written.

    Example::

        source = sources.load("c2i_model_256.safetensors", "xl-256").to("cuda")
        generate(ImageNet(settings.make("imagenet", "imagenet-256-1")), source, "samples")
    """
    benchmark = copy.copy(benchmark)
    benchmark.settings = settings = source.filled(benchmark.settings)
    drawer, processes = Drawer(source, benchmark), Processes.here()
    folder = Path(output) / folder_name(settings, source.name, benchmark.data_type)
    with contextlib.ExitStack() as stack:
        received = stack.enter_context(noted())
        stack.enter_context(arithmetic(settings, source.device))
        work = _prepared(folder, benchmark, source, processes, stack)
        share = _shares(work, benchmark)[processes.rank :: processes.world_size]
        run = _Run(folder, benchmark, drawer, received)
        run.make([each for part in share for each in part], processes)
        if not received:
            _wait_for_others(processes, received)
        if received:
            raise Interrupted(received[0], folder)
    return folder


@dataclass
class _Work:
    """An item of which files are absent."""

    item: Prompt
    place: int  # of its first picture in the list of all
    absent: set[str]
    wanted: Sequence[int]  # pictures to draw
    drawn: dict[int, Tensor] = field(default_factory=dict)


def _prepared(
    folder: Path, benchmark: Benchmark, source: Source, processes: Processes,
    stack: contextlib.ExitStack,
) -> list[_Work]:  # fmt: skip
    """What is to be done, as the first process sees it, which holds the folder's lock from then on;
    its refusal is that of all."""
    found: list[_Work] | Exception | None = None
    if processes.is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
            for left in folder.glob(".partial-*"):  # by a killed run
                shutil.rmtree(left)
            there = _files(folder)
            pictures = {file for file in there if file.lower().endswith(_SUFFIXES)}
            _refuse_foreign(folder, pictures, benchmark)
            found = list(_work(benchmark, there))
            record(folder, benchmark, source, processes, adds_to=pictures, draws=bool(found))
        except Exception as error:
            found = error
    found = processes.gather(found)[0]
    if isinstance(found, Exception):
        raise found
    return found


def _wait_for_others(processes: Processes, received: list[int]) -> None:
    try:
        processes.wait()
    except RuntimeError:  # one has left: the signal reached it first
        if not received:
            raise


def _files(folder: Path) -> set[str]:
    """Paths of all files under `folder`, as benchmarks name them."""
    paths = (Path(at, name) for at, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix() for path in paths}


def _refuse_foreign(folder: Path, pictures: set[str], benchmark: Benchmark) -> None:
    ours = {file for item in benchmark.items for file in benchmark.files(item)}
    if foreign := sorted(pictures - ours):
        raise ValueError(
            f"{folder} has {len(foreign)} files that are not of this run, such as {foreign[0]}: "
            "give another --output"
        )


def _work(benchmark: Benchmark, there: set[str]) -> Iterator[_Work]:
    for number, item in enumerate(benchmark.items):
        if absent := set(benchmark.files(item)) - there:
            place = number * benchmark.pictures
            yield _Work(item, place, absent, benchmark.wanted(item, absent))


def _shares(work: list[_Work], benchmark: Benchmark) -> list[list[_Work]]:
    """What one process should have to itself: items whose pictures are in one lot."""
    size = benchmark.settings.lot_size
    return [list(share) for _, share in groupby(work, lambda each: each.place // size)]


class _Run:
    """This process's share."""

    def __init__(self, folder: Path, benchmark: Benchmark, drawer: Drawer, received: list[int]):
        self.folder, self.benchmark, self.drawer = folder, benchmark, drawer
        self.received = received  # signals
        self.open: dict[str, _Work] = {}  # by the item's name: not all drawn yet
        self.writes: deque[Future[None]] = deque()

    def make(self, work: list[_Work], processes: Processes) -> None:
        """Draw and write it all, or what there is time for until a signal comes; files are
        written while others are drawn."""
        of = f"process 1 of {processes.world_size}" if processes.world_size > 1 else None
        bar = tqdm(
            total=sum(len(each.wanted) for each in work), unit=" pictures",
            disable=not processes.is_first, desc=of, smoothing=0.05,
        )  # fmt: skip
        with bar, ThreadPoolExecutor(_WRITERS) as pool:  # which ends what it has begun
            self.open = {each.item.name: each for each in work if each.wanted}
            for each in work:
                if not each.wanted:
                    self._submit(pool, each)
            for batch in self._batches(work):
                for picture, kept in self.drawer(batch, lambda: bool(self.received)):
                    self._keep(pool, picture, kept)
                    bar.update()
                if self.received:
                    break
            self._wait(0)

    def _batches(self, work: list[_Work]) -> Iterator[list[Picture]]:
        """Of so many pictures; lots, if there are any, stay whole."""
        settings, batch = self.benchmark.settings, []
        unit = settings.lot_size if settings.batch_invariant else 1
        pictures = (Picture(w.item, index, w.place + index) for w in work for index in w.wanted)
        for _, group in groupby(pictures, lambda picture: picture.place // unit):
            lot = list(group)
            if batch and len(batch) + len(lot) > settings.per_proc_batch_size:
                yield batch
                batch = []
            batch += lot
        if batch:
            yield batch

    def _keep(self, pool: ThreadPoolExecutor, picture: Picture, kept: Tensor) -> None:
        work = self.open[picture.item.name]
        work.drawn[picture.number] = kept
        if len(work.drawn) == len(work.wanted):
            self._submit(pool, self.open.pop(picture.item.name))

    def _submit(self, pool: ThreadPoolExecutor, work: _Work) -> None:
        self.writes.append(pool.submit(self._write, work))
        self._wait(4 * _WRITERS)

    def _wait(self, most: int) -> None:
        """Until at most so many writes are left; what they raise is raised here."""
        while len(self.writes) > most:
            self.writes.popleft().result()

    def _write(self, work: _Work) -> None:
        with filling(self.folder) as new:
            self.benchmark.write(work.item, work.drawn, work.absent, new, self.folder)
        work.drawn.clear()  # the list of all work is kept
