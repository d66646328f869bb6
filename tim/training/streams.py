"""Where a process's batches come from, endlessly and from any image count on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from tim.data import PackedSampler, TrainingSet
from tim.data.packing import mixed
from tim.training.draws import ImageStream


class Position(NamedTuple):
    """Where a process's stream of batches begins."""

    batch_size: int
    seed: int
    start: int  # images that all processes have seen
    rank: int
    world_size: int


def of_the_set(dataset: TrainingSet, at: Position) -> Sampler:
    """The training set's own sampler."""
    return dataset.sampler(**at._asdict())


def shuffled(dataset: TrainingSet, at: Position) -> Sampler:
    """Consecutive batches of a stream of images, each epoch in another order."""
    return ImageStream(len(dataset), **at._asdict())


class TokenPacks:
    """The pictures of a set in packs, each a batch (NiT, 2506.03131); called for a process's
    sampler.

    Args:
        unit: a token's side, in what `dataset.sizes` counts.
        tokens: the most of a pack; which pictures are together is drawn by `seed`.
        packs: lists of line numbers in their place.

    Attributes:
        images_per_pack: on average. efficiency: the share of `tokens` that pictures fill, of
            given packs the share of the largest.

    Raises:
        ValueError: a side is no multiple of `unit`, or a picture alone has more than `tokens`.
    """

    def __init__(
        self,
        dataset: TrainingSet,
        unit: int,
        tokens: int | None = None,
        packs: Sequence[Sequence[int]] | None = None,
        seed: int = 0,
    ):
        sizes = dataset.sizes
        if sizes is None:
            first = dataset[0]
            shape = first["latent" if "latent" in first else "image"].shape
            sizes = np.tile(shape[-2:], (len(dataset), 1))
        check_sides(sizes, unit)
        lengths = (sizes // unit).prod(axis=1)
        self.packs = mixed(lengths, tokens, seed=seed) if packs is None else packs
        self.tokens = np.array([lengths[pack].sum() for pack in self.packs])
        self.images_per_pack = sum(map(len, self.packs)) / len(self.packs)
        self.efficiency = self.tokens.mean() / (tokens or self.tokens.max())

    def __call__(self, dataset: TrainingSet, at: Position) -> PackedSampler:
        """The batches of one process; those of all at one time have as many tokens as can be."""
        options = at._asdict() | dict(tokens=self.tokens)
        del options["batch_size"]
        return PackedSampler(self.packs, **options)


def check_sides(sizes: np.ndarray, unit: int) -> None:
    """Refuse pictures (N, 2) that are not of whole tokens."""
    if (wrong := (sizes % unit != 0).any(axis=1)).any():
        h, w = sizes[wrong.argmax()]
        raise ValueError(
            f"sides must be multiples of {unit}, a token's; {wrong.sum():,} of {len(sizes):,} "
            f"pictures are not, the first is {h}×{w}"
        )
