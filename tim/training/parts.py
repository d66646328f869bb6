"""What a run trains on and with, apart from the network: built from a configuration or given."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Dataset

from tim.data import build_dataset
from tim.training.conditioning import ClassConditioning, Conditioning
from tim.training.draws import ImageStream
from tim.training.latents import Given, Latents
from tim.training.repa import Targets


class Position(NamedTuple):
    """Where a process's stream of batches begins."""

    seed: int
    images: int  # seen by all processes
    micro_steps: int
    batch_size: int
    rank: int
    world_size: int


def shuffled(dataset: Dataset, at: Position) -> Iterable[list[int]]:
    """Endless batches of indices, each epoch in another order."""
    return ImageStream(
        len(dataset),
        at.batch_size,
        seed=at.seed,
        start=at.images,
        rank=at.rank,
        world_size=at.world_size,
    )


@dataclass
class Parts:
    """Data and what is made of it.

    `dataset` gives mappings, or tuples of what `names` says. `sample_shape` (C, h, w) is that of
    the noise which samples are drawn from while training; `decode` makes pictures in [-1, 1] of
    them, as they are without it.
    """

    dataset: Dataset
    conditioning: Conditioning
    sample_shape: tuple[int, int, int]
    latents: Latents = Given("latent")
    repa: Targets | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    batches: Callable[[Dataset, Position], Iterable[list[Any]]] = shuffled
    collate: Callable[[list[Any]], Any] | None = None
    names: Sequence[str] = ("latent", "label")

    def batch(self, loaded: Any, device: torch.device) -> dict[str, Any]:
        """What the loader gave as a mapping, its tensors on their way to the device."""
        entries = loaded if isinstance(loaded, dict) else dict(zip(self.names, loaded, strict=True))
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in entries.items()
        }


def build(cfg: DictConfig, network: Mapping[str, Any], device: torch.device) -> Parts:
    """The parts of `cfg` for a network of that `config`, on the device.

    Raises:
        ValueError: `data.data_type` names no known data.
    """
    dataset = build_dataset(cfg)
    conditioning = ClassConditioning(network["num_classes"], network["class_dropout_prob"])
    return Parts(dataset, conditioning, tuple(dataset[0][0].shape))
