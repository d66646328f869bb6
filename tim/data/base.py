"""What the data sets have in common: named items, draws by a key, files that cannot be read."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from tim.data.samplers import FlatSampler, Visit

T = TypeVar("T")
Item = dict[str, Any]


class UnreadableError(OSError):
    """A file that a data set names is missing, damaged or not what it should be."""


class TrainingSet(Dataset[Item]):
    """A map-style set of dicts.

    What an item draws (its flip, its caption) comes from the key of a `Visit`, as samplers yield
    it; for a plain index from the generators of torch and `random`, as published.

    Attributes:
        names: what an item has. `latent` (C, h, w) float32, scaled as the network takes it;
            `image` (C, H, W) float32 in [-1, 1]; `label` () int64; `caption`, a str.
        num_classes: labels are less than this; None without labels.
        sizes: (N, 2), height and width of every item's latent, or image where it has none; None if
            all are as the first.
    """

    names: tuple[str, ...]
    num_classes: int | None = None
    sizes: np.ndarray | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Item:
        """Raises:
        UnreadableError: a file of the item is missing or damaged; the message names it.
        """
        raise NotImplementedError

    def sampler(
        self, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> Sampler[list[Visit]]:
        """This process's endless batches from image `start` on, an image count of all processes.

        Its `seen(micro_steps)` is the image count after so many batches of every process.
        """
        return FlatSampler(
            len(self), batch_size, seed=seed, start=start, rank=rank, world_size=world_size
        )

    def collate(self, items: Sequence[Item]) -> Item:
        """A batch by name: stacked tensors (lists where sizes differ), captions as a list."""
        columns = {name: [item[name] for item in items] for name in self.names}
        return {
            name: column if _is_ragged(column) else default_collate(column)
            for name, column in columns.items()
        }


def _is_ragged(column: list[Any]) -> bool:
    return isinstance(column[0], Tensor) and len({each.shape for each in column}) > 1


def is_mirrored(index: int) -> bool:
    """An even draw of the visit."""
    return bool(torch.rand(1, generator=_generator(index)) >= 0.5)


def choice(options: Sequence[T], index: int) -> T:
    """One of them, by a draw of the visit."""
    generator = _generator(index)
    if generator is None:
        return random.choice(options)
    return options[int(torch.randint(len(options), (), generator=generator))]


def _generator(index: int) -> torch.Generator | None:
    if not isinstance(index, Visit):
        return None
    sequence = np.random.SeedSequence(index.seed, spawn_key=(index.image,))
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong inside is an UnreadableError that names `path`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a broken file may raise anything
        reason = " ".join(str(error).split())
        raise UnreadableError(f"{path}: {type(error).__name__}: {reason}") from error
