"""LoRA (arXiv 2106.09685): low-rank adapters of a frozen base are all that trains and is kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from tim import checkpoints, config
from tim.checks import some, whole
from tim.models import TiMTransformer2DModel, lora
from tim.provenance import state_hash
from tim.training.initial import weights_file
from tim.training.weights import Whole

_NAME = "default"  # of the adapter


@dataclass(frozen=True)
class LoRA:
    """The section `training.lora`: W + alpha/rank·B·A in place of the weight W of some layers.

    Args:
        rank: of B·A.
        alpha: `rank` by default, a scale of 1.
        dropout: of what A takes, in training; none where a derivative is formed.
        target_modules: endings of the layers' names, such as ["attn.qkv"], or a regular
            expression for whole names; `tim.models.lora.TARGETS` by default.
        init_from: a LoRA of the same rank and layers to begin with, a file or a folder.

    Raises:
        ValueError: a value is not so.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list | str | None = None
    init_from: str | None = None

    def __post_init__(self):
        whole("rank", self.rank, 1)
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be positive or null, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        names = self.target_modules
        if isinstance(names, list) and not (names and all(isinstance(n, str) for n in names)):
            raise ValueError(f"target_modules must be names of layers, got {names}")

    @property
    def metadata(self) -> dict[str, Any]:
        """What diffusers must know of a file."""
        alpha, targets = self.alpha or self.rank, self.target_modules or list(lora.TARGETS)
        return {"r": self.rank, "lora_alpha": alpha, "target_modules": targets}


def weights(cfg: DictConfig) -> Whole:
    """What trains by `training.lora` of a checked configuration.

    Raises:
        ValueError: a setting is unknown or wrong, or does not go with the rest.
        ImportError: peft is not installed.
    """
    section = config.resolved(cfg)["training"]["lora"]
    if section is None:
        return Whole()
    found = config.construct(LoRA, section, section="training.lora")
    if cfg.model.ckpt is None:
        raise ValueError("model.ckpt must be the weights that training.lora adapts, got None")
    if cfg.training.parallel != "ddp":
        raise ValueError(
            f"training.parallel must be ddp for training.lora, got {cfg.training.parallel}: "
            "adapters and their moments are small, and the frozen base is not shared out"
        )
    lora.needs_peft("training.lora")
    return Adapters(found)


class Adapters(Whole):
    """The adapters alone, in diffusers' file; `base` is the hash of the frozen weights."""

    have_base = True
    file = lora.FILE

    def __init__(self, settings: LoRA):
        self.settings, self.dropout = settings, settings.dropout

    def fresh(self, cfg: DictConfig) -> TiMTransformer2DModel:
        """The base of `model.ckpt`, in float32 and frozen, with adapters that change nothing yet.

        Raises:
            ValueError: the file is not of the network of `cfg`, or there is no such layer.
        """
        from peft import LoraConfig

        network = base(cfg)
        self.base = state_hash(network)
        settings = LoraConfig(**self.settings.metadata, lora_dropout=self.settings.dropout)
        try:
            network.requires_grad_(False).add_adapter(settings, _NAME)
        except ValueError as error:
            raise ValueError(
                f"training.lora.target_modules: {' '.join(str(error).split())}"
            ) from error
        if (given := self.settings.init_from) is not None:
            weights, metadata = lora.read(given, {})
            lora.check(network, weights, given, metadata=metadata)
            self.take(network, _unprefixed(weights))
        return network.train()

    def trained(self, network: nn.Module) -> list[nn.Parameter]:
        return [p for name, p in network.named_parameters() if ".lora_" in name]

    def write(self, network: TiMTransformer2DModel, folder: Path) -> None:
        lora.Loader.save_lora_weights(
            str(folder), _weights(network),
            transformer_lora_adapter_metadata=self.settings.metadata,
        )  # fmt: skip

    def read(self, folder: Path) -> dict[str, Tensor]:
        return _unprefixed(super().read(folder))

    def take(self, network: TiMTransformer2DModel, weights: dict[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        has, given = (
            {n: tuple(w.shape) for n, w in w.items()} for w in (_weights(network), weights)
        )
        if odd := [name for name in {**has, **given} if has.get(name) != given.get(name)]:
            raise ValueError(
                f"these adapters are of another rank or of other layers: {odd[0]} is "
                f"{given.get(odd[0])}, not {has.get(odd[0])}"
            )
        set_peft_model_state_dict(network, weights, _NAME)


def base(cfg: DictConfig) -> TiMTransformer2DModel:
    """The network of `model.ckpt`, whole, in float32.

    Raises:
        ValueError: its weights or its config.json are of another network than that of `cfg`.
    """
    file = weights_file(cfg.model.ckpt)
    network = checkpoints.load(file, cfg, dtype=torch.float32)
    if (file.parent / "config.json").is_file():
        was, now = TiMTransformer2DModel.load_config(file.parent), network.config
        odd = [
            f"{name} {was[name]}, not {now[name]}"
            for name in now
            if name in was and not name.startswith("_") and was[name] != now[name]
            and name not in ("z_dim", "projector_dim")
        ]  # fmt: skip
        if odd:
            raise ValueError(f"{file} is of a network with {some(odd)}: see model.network")
    return network


def opened(folder: Path, cfg: DictConfig) -> TiMTransformer2DModel:
    """The base of `cfg` with the adapter that a run left in `folder`."""
    network = base(cfg)
    network.load_lora_adapter(folder, adapter_name=_NAME)
    return network


def _weights(network: TiMTransformer2DModel) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(network, adapter_name=_NAME)


def _unprefixed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): weight for name, weight in weights.items()}
