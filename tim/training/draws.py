"""Random draws that depend on a seed and a position in the run, never on what ran before.

A resumed run therefore sees exactly the data order and the noise of an unbroken one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from tim.checks import whole


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by all of `key`, such as (seed, rank, images seen)."""
    key = [whole("a seed's part", part, 0) for part in key]
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device=device).manual_seed(seed)


class Draws(NamedTuple):
    """Where a micro-batch has its chance from: on the device, and on the host for what is decided
    there, such as which texts are dropped."""

    device: torch.Generator
    host: torch.Generator

    @classmethod
    def of(cls, *key: int, device: torch.device | str) -> "Draws":
        """By `key`, such as (seed, rank, images seen)."""
        return cls(generator(*key, device=device), generator(*key, 1))


class ImageStream(Sampler[list[int]]):
    """Endless batches of dataset indices, shuffled anew each epoch, starting at any image count.

    Image k of the stream is entry k mod N of epoch k div N; a batch may span two epochs. Of every
    `batch_size * world_size` images each rank takes its own consecutive `batch_size`.
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
        self.num_images = whole("num_images", num_images, 1)
        self.batch_size = whole("batch_size", batch_size, 1)
        self.seed, self.start = whole("seed", seed, 0), whole("start", start, 0)
        self.rank, self.world_size = whole("rank", rank, 0), whole("world_size", world_size, 1)

    def seen(self, micro_steps: int) -> int:
        """Images that all processes have seen after so many batches of each."""
        return self.start + micro_steps * self.batch_size * self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        order, order_epoch = None, -1
        first = self.start + self.rank * self.batch_size
        while True:
            batch = []
            for image in range(first, first + self.batch_size):
                epoch, position = divmod(image, self.num_images)
                if epoch != order_epoch:
                    order_epoch = epoch
                    order = torch.randperm(self.num_images, generator=generator(self.seed, epoch))
                batch.append(int(order[position]))
            yield batch
            first += self.batch_size * self.world_size
