"""Batches of pictures: noise, sampling, decoding."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tim.checks import check_computed
from tim.data.prompts import Prompt
from tim.generate import draws
from tim.generate.benchmarks import Benchmark, ImageNet
from tim.generate.conditions import Condition, Labels, Texts
from tim.generate.settings import Settings
from tim.generate.sources import Source
from tim.sampling import sample


class Picture(NamedTuple):
    """One of an item."""

    item: Prompt
    number: int  # of the item's
    place: int  # in the list of all pictures


class _Row(NamedTuple):
    picture: Picture
    condition: Condition


class Drawer:
    """Draws pictures of a benchmark, whose settings are filled.

    Raises:
        ValueError: the network is for the other kind of benchmark, or has fewer classes.
    """

    def __init__(self, source: Source, benchmark: Benchmark):
        self._source, self._benchmark = source, benchmark
        settings, known = benchmark.settings, source.network.config.num_classes
        if isinstance(benchmark, ImageNet) != (source.network.config.cap_feat_dim is None):
            needed = "classes" if isinstance(benchmark, ImageNet) else "prompts"
            raise ValueError(f"{benchmark.name} needs a network of {needed}: {source.name} is not")
        if isinstance(benchmark, ImageNet):
            self._conditions = Labels(settings, known, source.device)
        elif source.text is None:
            raise ValueError(f"{benchmark.name} needs a text encoder")
        else:
            self._conditions = Texts(source.text, settings, benchmark.items)

    def __call__(
        self, batch: Sequence[Picture], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Picture, Tensor]]:
        """Each picture as the benchmark keeps it, on the CPU, in any order; where `should_stop`
        says so, no more.

        Raises:
            FloatingPointError: what a network computes is not finite.
        """
        conditions = self._conditions([picture.item for picture in batch])
        for rows in self._groups(list(map(_Row, batch, conditions))):
            with _named([row.picture for row in rows]):
                lot, places = self._lot(rows)
                x = self._sampled(lot, should_stop)[places]
                if should_stop():
                    return
                kept = x.float() if self._benchmark.keeps_latents else self._levels(x)
            yield from zip((row.picture for row in rows), kept.cpu(), strict=True)

    def _groups(self, rows: list[_Row]) -> Iterable[list[_Row]]:
        """What goes through the network at once: features of one length, of one lot."""
        settings = self._benchmark.settings
        groups = defaultdict(list)
        for row in rows:
            lot = row.picture.place // settings.lot_size if settings.batch_invariant else None
            groups[lot, row.condition.y.shape].append(row)
        return groups.values()

    def _lot(self, rows: list[_Row]) -> tuple[list[_Row], list[int]]:
        """What the network runs, and where the rows are in it.

        A picture has its place in a lot of a fixed size, and the first one fills the gaps: what a
        row is computed by hangs on the shape and the place alone.
        """
        settings = self._benchmark.settings
        if not settings.batch_invariant:
            return rows, list(range(len(rows)))
        by_place = {row.picture.place % settings.lot_size: row for row in rows}
        lot = [by_place.get(place, rows[0]) for place in range(settings.lot_size)]
        return lot, list(by_place)

    def _sampled(self, rows: list[_Row], should_stop: Callable[[], bool]) -> Tensor:
        """The states at T_min, (B, C, h, w)."""
        source, s = self._source, self._benchmark.settings
        keys = [(s.global_seed, row.picture.item.name, row.picture.number) for row in rows]
        noise = torch.stack([draws.noise(*key, source.shape(s)) for key in keys])
        y = torch.cat([row.condition.y for row in rows])
        y_null = torch.cat([row.condition.y_null for row in rows]) if s.cfg_scale > 1 else None
        return sample(
            source.network, source.transport, source.transport.initial_state(noise.to(y.device)),
            y, y_null, num_steps=s.num_steps, T_max=s.T_max, T_min=s.T_min,
            cfg_scale=s.cfg_scale, cfg_low=s.guidance_low, cfg_high=s.guidance_high,
            stochasticity_ratio=s.stochasticity_ratio, sample_type=s.sample_type,
            generator=[draws.step_generator(*key) for key in keys], should_stop=should_stop,
        )  # fmt: skip

    def _levels(self, x: Tensor) -> Tensor:
        settings = self._benchmark.settings
        parts = x.split(1) if settings.slice_vae or settings.batch_invariant else [x]
        images = torch.cat([self._source.decode(part) for part in parts])
        check_computed("the pictures", images, "the autoencoder", images.dtype)
        return self._benchmark.levels(images)


@contextlib.contextmanager
def _named(pictures: Sequence[Picture]) -> Iterator[None]:
    """Errors say which pictures it was."""
    try:
        yield
    except FloatingPointError as error:
        names = ", ".join(f"{item.name} ({number})" for item, number, _ in pictures)
        one_of = "one of " if len(pictures) > 1 else ""
        raise FloatingPointError(f"{one_of}{names}: {error}") from error


@contextlib.contextmanager
def arithmetic(settings: Settings, device: torch.device) -> Iterator[None]:
    """PyTorch's global settings as these want them, for as long as it is open."""
    cuda, threads = torch.backends.cuda.matmul, torch.get_num_threads()
    tf32, cudnn = cuda.allow_tf32, torch.backends.cudnn
    cuda.allow_tf32 = settings.tf32
    invariant = settings.batch_invariant
    convolutions = cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark and not invariant,
        deterministic=cudnn.deterministic or invariant, allow_tf32=cudnn.allow_tf32,
    )  # fmt: skip
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with convolutions, here:
            if invariant and device.type == "cpu":  # sums depend on how many threads share them
                torch.set_num_threads(1)
            yield
    finally:
        cuda.allow_tf32 = tf32
        torch.set_num_threads(threads)
