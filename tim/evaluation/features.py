"""Features of pictures, measured by as many processes as there are and kept for the next run."""

import itertools
import json
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from tim.data.files import some
from tim.evaluation.pictures import Bad, Pictures, key_of
from tim.evaluation.statistics import Moments
from tim.files import replacing
from tim.processes import Processes

CHUNK = 500  # pictures whose features are one file


class Features(NamedTuple):
    """What a network sees in N pictures, each float32; None is what it does not give."""

    pool: Tensor  # (N, D)
    spatial: Tensor | None = None  # (N, S)
    logits: Tensor | None = None  # (N, K)


class FeatureNetwork(Protocol):
    """Pictures uint8 (N, 3, H, W) → features.

    Attributes:
        name: the network, its weights and its preprocessing in one line. Features are kept under
            it for the next run; without a name they are not.
    """

    def __call__(self, pictures: Tensor) -> Features: ...


@dataclass
class Measured:
    """Features on the disk, a file for every `CHUNK` pictures, in the order of the pictures.

    Attributes:
        names: the pictures that were measured.
        bad: those that could not be.
    """

    files: list[Path]
    names: list[str]
    bad: list[Bad]

    def __iter__(self) -> Iterator[Features]:
        for path in self.files:
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if len(found["pool"]):
                yield Features(**found)

    def joined(self, kind: str = "pool") -> Tensor:
        """One kind of features of all pictures (N, …)."""
        return torch.cat([getattr(features, kind) for features in self])

    def moments(self, kind: str = "pool") -> Moments:
        """Of one kind of features, without holding all of them."""
        return self.moments_by(lambda name: "", kind)[""]

    def moments_by(self, part: Callable[[str], str], kind: str = "pool") -> dict[str, Moments]:
        """The same by what `part` makes of a picture's name."""
        found: dict[str, Moments] = defaultdict(Moments)
        names, is_quick = iter(self.names), len(self.files) < 10
        for features in tqdm(self, "statistics", len(self.files), disable=is_quick):
            rows = getattr(features, kind)
            parts = [part(name) for name in itertools.islice(names, len(rows))]
            for each in dict.fromkeys(parts):
                chosen = torch.tensor([other == each for other in parts])
                found[each].add(rows[chosen])
        return dict(found)


class Work(NamedTuple):
    """Where features go.

    Attributes:
        kept: those with a name, for the next run.
        once: those without, removed at the end.
    """

    kept: Path
    once: Path

    def place(self, network: FeatureNetwork, stamp: str | None) -> Path:
        name = getattr(network, "name", None)
        if name is None or stamp is None:
            return self.once / f"{secrets.token_hex()}.safetensors"
        return self.kept / f"{key_of(name, stamp)}.safetensors"


@contextmanager
def work_folder(path: str | Path | None) -> Iterator[Work]:
    """A folder that all processes share; None is one that is gone at the end."""
    processes = Processes.here()
    if path is not None:
        Path(path).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".once-", dir=path) as own:
        once = Path(processes.gather(own)[0])
        yield Work(once if path is None else Path(path), once)
        processes.wait()


def measure(
    pictures: Pictures,
    network: FeatureNetwork,
    work: Work,
    *,
    count: int | None = None,
    batch_size: int = 64,
    leave_out: bool = False,
    label: str = "pictures",
) -> Measured:
    """The features of the first `count` pictures (None is all), those in `work` read again.

    Every process of torch.distributed's default group, if there is one, takes its share.

    Raises:
        ValueError: pictures cannot be read or have features that are not finite, and
            `leave_out` does not say to go on without them; or none is left.
    """
    processes = Processes.here()
    count = len(pictures.names) if count is None else count
    chunks = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    mine = chunks[processes.rank :: processes.world_size]
    paths = {chunk: work.place(network, pictures.stamp(*chunk)) for chunk in mine}
    missing = [chunk for chunk in mine if not paths[chunk].is_file()]
    total = sum(stop - start for start, stop in mine)
    done = total - sum(stop - start for start, stop in missing)
    read = pictures.read(place for chunk in missing for place in range(*chunk))
    with tqdm(
        total=total, initial=done, desc=label, unit=" pictures", disable=not processes.is_first
    ) as bar:
        for start, stop in missing:
            chunk = _Chunk(pictures.names[start:stop], network)
            for place in range(start, stop):
                chunk.add(place - start, next(read), batch_size)
                bar.update()
            chunk.save(paths[start, stop], batch_size)
    together = {k: path for part in processes.gather(paths) for k, path in part.items()}
    files = [together[chunk] for chunk in chunks]
    measured = _listed(files, [pictures.names[start:stop] for start, stop in chunks])
    _refuse(measured, count, leave_out)
    return measured


class _Chunk:
    """Features of some pictures, as they come."""

    def __init__(self, names: list[str], network: FeatureNetwork):
        self._names, self._network = names, network
        self._waiting: list[tuple[int, Tensor]] = []
        self._kept: list[int] = []
        self._features: list[Features] = []
        self._bad: list[Bad] = []

    def add(self, place: int, picture: Tensor | Bad, batch_size: int) -> None:
        if isinstance(picture, Bad):
            self._bad.append(picture)
            return
        if self._waiting and self._waiting[0][1].shape != picture.shape:
            self._measure()
        self._waiting.append((place, picture))
        if len(self._waiting) == batch_size:
            self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        if not self._waiting:
            return
        places = [place for place, _ in self._waiting]
        given = self._network(torch.stack([picture for _, picture in self._waiting]))
        self._waiting = []
        found = Features(*(part if part is None else part.float().cpu() for part in given))
        parts = [part.flatten(1) for part in found if part is not None]
        if any(len(part) != len(places) for part in parts):
            raise ValueError(
                f"the network gave {[len(part) for part in parts]} rows of {len(places)} pictures"
            )
        finite = torch.stack([part.isfinite().all(1) for part in parts]).all(0)
        for place, is_finite in zip(places, finite.tolist(), strict=True):
            if is_finite:
                self._kept.append(place)
            else:
                self._bad.append(Bad(self._names[place], "its features are not finite"))
        self._features.append(Features(*(p if p is None else p[finite] for p in found)))

    def save(self, path: Path, batch_size: int) -> None:
        self._measure()
        kinds = zip(Features._fields, zip(*self._features, strict=True), strict=False)
        tensors = {kind: torch.cat(parts) for kind, parts in kinds if parts[0] is not None}
        facts = {"kept": json.dumps(self._kept), "bad": json.dumps(self._bad)}
        with replacing(path) as new:
            save_file(tensors or {"pool": torch.empty(0, 0)}, new, metadata=facts)


def _listed(files: list[Path], names: list[list[str]]) -> Measured:
    kept, bad = [], []
    for path, of_chunk in zip(files, names, strict=True):
        with safe_open(path, "pt") as file:
            facts = file.metadata()
        kept += [of_chunk[place] for place in json.loads(facts["kept"])]
        bad += [Bad(*entry) for entry in json.loads(facts["bad"])]
    return Measured(files, kept, bad)


def _refuse(measured: Measured, count: int, leave_out: bool) -> None:
    if measured.bad and not leave_out:
        lines = [f"{name} ({reason})" for name, reason in measured.bad]
        raise ValueError(
            f"{len(lines):,} of {count:,} pictures cannot be measured: {some(lines)}; "
            "--leave-out measures the others and counts these"
        )
    if not measured.names:
        raise ValueError(f"none of {count:,} pictures can be measured: {some(measured.bad, 1)}")
