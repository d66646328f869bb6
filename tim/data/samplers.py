"""Endless batches in the published order, from any image count on and for any number of processes.

Epoch e is the permutation of seed + e. The epochs one after the other are one stream, of images
(flat) or of batches (packed), and process r of W takes its entries r, r + W, r + 2 W, …
"""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch.utils.data import Sampler

from tim.checks import whole


class Visit(int):
    """An index into a data set, with the key of what is drawn for it: seed and images seen."""

    seed: int
    image: int

    def __new__(cls, index: int, seed: int, image: int):
        visit = super().__new__(cls, index)
        visit.seed, visit.image = seed, image
        return visit

    def __getnewargs__(self) -> tuple[int, int, int]:
        return int(self), self.seed, self.image


class _Stream(Sampler[list[Visit]]):
    def __init__(self, seed: int, start: int, rank: int, world_size: int):
        self.seed, self.start = whole("seed", seed, 0), whole("start", start, 0)
        self.rank, self.world_size = whole("rank", rank, 0), whole("world_size", world_size, 1)
        if self.rank >= self.world_size:
            raise ValueError(f"rank must be less than world_size {world_size}, got {rank}")

    def _permutation(self, length: int, epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(length, generator=generator).numpy()


class FlatSampler(_Stream):
    """Batches of `batch_size` images of `num_images`; one may span two epochs.

    Args:
        start: images that all processes together have seen.

    Raises:
        ValueError: a size is not positive, or `rank` is not below `world_size`.

    Example:
        >>> next(iter(FlatSampler(5, 2, seed=0)))
        [4, 1]
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(seed, start, rank, world_size)
        self.num_images = whole("num_images", num_images, 1)
        self.batch_size = whole("batch_size", batch_size, 1)

    def seen(self, micro_steps: int) -> int:
        """Images that all processes have seen after so many batches of each."""
        return self.start + micro_steps * self.batch_size * self.world_size

    def __iter__(self) -> Iterator[list[Visit]]:
        order, of_epoch = np.empty(0, int), -1
        for micro_step in count():
            batch, first = [], self.seen(micro_step) + self.rank
            for image in range(first, self.seen(micro_step + 1), self.world_size):
                epoch, position = divmod(image, self.num_images)
                if epoch != of_epoch:
                    order, of_epoch = self._permutation(self.num_images, epoch), epoch
                batch.append(Visit(order[position], self.seed, image))
            yield batch


class PackedSampler(_Stream):
    """The given batches of indices, shuffled.

    Args:
        packs: batches of any lengths of at least 1, each always together.
        start: images that all processes together have seen. The first batch is the stream's first
            that begins there or later.
        tokens: of each batch. The batches that the processes have at one time are then as equal as
            they can be, and another number of processes has another order.

    Raises:
        ValueError: a batch is empty or there is none, `tokens` are of others, or `rank` is not
            below `world_size`.

    Example:
        >>> next(iter(PackedSampler([[0, 1], [2], [3, 4, 5]], seed=0)))
        [3, 4, 5]
    """

    def __init__(
        self,
        packs: Sequence[Sequence[int]],
        *,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        tokens: Sequence[int] | None = None,
    ):
        super().__init__(seed, start, rank, world_size)
        self.packs = packs
        self._tokens = None if tokens is None else np.asarray(tokens)
        if tokens is not None and len(tokens) != len(packs):
            raise ValueError(f"tokens must be of {len(packs)} batches, got {len(tokens)}")
        self._sizes = np.array([len(pack) for pack in packs])
        if not (self._sizes > 0).any() or not self._sizes.all():
            raise ValueError(f"packs must be lists of indices, got {len(packs)}, some or all empty")
        self._images = int(self._sizes.sum())  # of an epoch
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        epoch, image = divmod(self.start, self._images)
        self._first = epoch * len(packs) + int(np.searchsorted(self._epoch(epoch)[1], image))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the batches, and the images before each."""
        if epoch not in self._epochs:
            order = self._permutation(len(self.packs), epoch)
            if self._tokens is not None:
                order = self._side_by_side(order, epoch)
            before = np.cumsum(self._sizes[order]) - self._sizes[order]
            while len(self._epochs) > 1:  # what reads ahead may be in the next one
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = order, before
        return self._epochs[epoch]

    def _side_by_side(self, order: np.ndarray, epoch: int) -> np.ndarray:
        """The batches in groups of as many tokens, one for each process. An epoch begins and ends
        inside of a group; these are the largest batches, of which most are alike."""
        W, length = self.world_size, len(order)
        order = order[np.argsort(-self._tokens[order], kind="stable")]
        head = min(-epoch * length % W, length)
        tail = (length - head) % W
        groups = order[head + tail :].reshape(-1, W)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        groups = groups[torch.randperm(len(groups), generator=generator).numpy()]
        return np.concatenate((order[:head], groups.ravel(), order[head : head + tail]))

    def _batch(self, number: int) -> tuple[int, int]:
        """Of the stream's batch: which pack, and the images before it."""
        epoch, position = divmod(number, len(self.packs))
        order, before = self._epoch(epoch)
        return int(order[position]), epoch * self._images + int(before[position])

    def seen(self, micro_steps: int) -> int:
        """Images that all processes have seen after so many batches of each."""
        return self._batch(self._first + micro_steps * self.world_size)[1]

    def __iter__(self) -> Iterator[list[Visit]]:
        for number in count(self._first + self.rank, self.world_size):
            pack, seen = self._batch(number)
            yield [Visit(at, self.seed, seen + j) for j, at in enumerate(self.packs[pack])]
