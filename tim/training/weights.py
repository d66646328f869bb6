"""What of a network trains, averages and is kept in checkpoints: all of it, or its adapters."""

from pathlib import Path

import safetensors.torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from omegaconf import DictConfig
from torch import Tensor, nn

from tim import config
from tim.models import TiMTransformer2DModel
from tim.training import initial


class Whole:
    """The whole network, as `save_pretrained` writes it.

    Attributes:
        have_base: whether something does not train, and is not kept.
        base: its hash.
        dropout: how much of them is dropped out in training.
    """

    have_base = False
    base: str | None = None
    dropout = 0.0
    file = SAFETENSORS_WEIGHTS_NAME

    def fresh(self, cfg: DictConfig) -> TiMTransformer2DModel:
        """The network before the first step."""
        network = config.build_network(cfg)
        if cfg.model.ckpt is not None and network.device.type != "meta":
            initial.start_from(network, cfg.model.ckpt)
        return network

    def trained(self, network: nn.Module) -> list[nn.Parameter]:
        """What the optimizer and the average hold, in the order of the network."""
        return list(network.parameters())

    def write(self, network: TiMTransformer2DModel, folder: Path) -> None:
        """Fill `folder`."""
        network.save_pretrained(folder)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """What `write` wrote."""
        return safetensors.torch.load_file(folder / self.file)

    def take(self, network: TiMTransformer2DModel, weights: dict[str, Tensor]) -> None:
        """Put what was read into a network.

        Raises:
            ValueError: it is of another one.
        """
        network.load_state_dict(weights)

    def check_base(self, folder: Path, base: str | None) -> None:
        """Refuse a checkpoint of another kind, or on another base.

        Raises:
            ValueError: in so many words.
        """
        if base == self.base:
            return
        was, now = (
            "a whole network" if found is None else f"adapters of a base with hash {found[:12]}"
            for found in (base, self.base)
        )
        raise ValueError(f"{folder} is of {was}, this run of {now}: see training.lora, model.ckpt")
