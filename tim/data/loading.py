"""Batches of a training set from several processes, in spite of a few files that are broken."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch import Generator
from torch.utils.data import DataLoader, Dataset, Sampler

from tim.data.base import TrainingSet, UnreadableError
from tim.data.files import some
from tim.data.samplers import Visit

_log = logging.getLogger(__name__)
MOST_INSTEAD = 16  # items that are tried in place of a batch without any
_FEW = 1000  # the share counts as if so many items were drawn at least


class Loader:
    """The batches of a sampler, as the set collates them, on the CPU.

    An item that cannot be read is left out, and counted in `unreadable`; a warning names each file
    once. Of a batch without any, the next readable item of the set stands in.

    Args:
        num_workers: processes that read ahead; 0 reads in this one.
        worker_init_fn: called in each of them with its number.
        pin_memory: for copies to a GPU that do not block.
        most_unreadable: the share of the items drawn so far (counted as 1000 at least).

    Attributes:
        drawn: items so far. unreadable: how many of them could not be read.

    Raises:
        ValueError: `most_unreadable` is no share.
        UnreadableError: from iterating, when more than that share could not be read.

    Example:
        >>> loader = Loader(data, data.sampler(64, seed=0), num_workers=4)
        >>> batch = next(iter(loader))  # {"latent": (64, C, h, w), …}
    """

    def __init__(
        self,
        data: TrainingSet,
        sampler: Sampler[list[Visit]],
        *,
        num_workers: int = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        pin_memory: bool = False,
        most_unreadable: float = 0.01,
    ):
        if not 0 <= most_unreadable <= 1:
            raise ValueError(f"most_unreadable must be a share in [0, 1], got {most_unreadable}")
        self.most_unreadable = most_unreadable
        self.drawn = self.unreadable = 0
        self._named: dict[str, None] = {}  # a set in order
        self._loader = DataLoader(
            _Batches(data),
            sampler=sampler,
            batch_size=None,  # what the sampler yields is a batch
            collate_fn=_as_it_is,
            num_workers=num_workers,
            worker_init_fn=worker_init_fn,
            pin_memory=pin_memory,
            generator=Generator(),  # its own draw leaves torch's generator alone
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch, drawn, failed in self._loader:
            self.drawn += drawn
            self._note(failed)
            if not batch:
                raise UnreadableError(f"none of {len(failed)} items can be read: {some(failed)}")
            yield batch

    def _note(self, failed: list[str]) -> None:
        self.unreadable += len(failed)
        for reason in failed:
            if reason not in self._named:
                self._named[reason] = None
                _log.warning("cannot be read: %s", reason)
        if failed and self.unreadable > self.most_unreadable * max(self.drawn, _FEW):
            raise UnreadableError(
                f"{self.unreadable} of {self.drawn} items cannot be read, more than "
                f"{self.most_unreadable:.2g}: {some(list(self._named))}"
            )


class _Batches(Dataset):
    """Whole batches by lists of indices: what could be read, how many were asked for, and why
    others could not be."""

    def __init__(self, data: TrainingSet):
        self.data = data

    def __getitem__(self, indices: list[Visit]) -> tuple[dict[str, Any], int, list[str]]:
        items, failed = [], []
        for index in indices:
            self._read(index, items, failed)
        last = indices[-1]
        for i in range(1, MOST_INSTEAD + 1):
            if not items:
                at = (last + i) % len(self.data)
                is_keyed = isinstance(last, Visit)
                self._read(Visit(at, last.seed, last.image) if is_keyed else at, items, failed)
        return self.data.collate(items) if items else {}, len(indices), failed

    def _read(self, index: Visit, items: list[Any], failed: list[str]) -> None:
        try:
            items.append(self.data[index])
        except UnreadableError as error:
            failed.append(str(error))


def _as_it_is(batch: Any) -> Any:
    return batch
