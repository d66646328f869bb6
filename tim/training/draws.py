"""Random draws that depend on a seed and a position in the run, never on what ran before.

A resumed run therefore sees exactly the data order and the noise of an unbroken one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from tim.checks import whole
from tim.data import FlatSampler


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


class ImageStream(FlatSampler):
    """Endless batches of dataset indices, shuffled anew each epoch, starting at any image count.

    Image k of the stream is entry k mod N of epoch k div N; a batch may span two epochs. Of every
    `batch_size * world_size` images each rank takes its own consecutive `batch_size`.
    """

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
