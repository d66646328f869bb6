"""From a checkpoint to the networks that draw pictures."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tim import transports
from tim.encoders import Autoencoder, TextEncoder
from tim.generate.settings import Settings
from tim.models import TiMTransformer2DModel
from tim.opening import open_pipeline, weight_files
from tim.pipelines import TiMTextPipeline
from tim.provenance import file_hash, state_hash
from tim.transports import Transport

S = TypeVar("S", bound=Settings)


@dataclass
class Source:
    """What draws pictures.

    Attributes:
        name: of the checkpoint up to its first dot, part of the folder's name.
        autoencoder: None for a network of pixels.
        text: the encoder of prompts, which settings tell whether to escape them; None for a network
            of classes.
        files: those that the network's weights were read from.

    Raises:
        ValueError: the parts do not fit each other.
    """

    name: str
    network: TiMTransformer2DModel
    transport: Transport
    autoencoder: Autoencoder | None = None
    text: TextEncoder | None = None
    files: tuple[Path, ...] = ()

    def __post_init__(self):
        channels, width = self.network.config.in_channels, self.network.config.cap_feat_dim
        if self.autoencoder is None and channels not in (1, 3):
            raise ValueError(
                f"a network of {channels} channels needs an autoencoder: name it as model.vae_dir"
            )
        if self.autoencoder is not None and self.autoencoder.channels != channels:
            raise ValueError(
                f"the autoencoder has {self.autoencoder.channels} latent channels, the network "
                f"{channels}"
            )
        if self.text is not None and self.text.width != width:
            raise ValueError(
                f"the network reads text features of {width}, the encoder has {self.text.width}"
            )

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> "Source":
        for module in self._modules().values():
            module.to(device)
        return self

    def filled(self, settings: S) -> S:
        """`settings` with what they leave to the network and the transport.

        Raises:
            ValueError: sizes, guidance or a dtype that are not the network's.
        """
        network, factor, dtype = self.network.config, self._factor, self.network.dtype
        if dtype != getattr(torch, settings.dtype):
            raise ValueError(f"the network is in {dtype}: load it in {settings.dtype}")
        own, unit = network.input_size * factor, factor * network.patch_size
        height, width = settings.height or own, settings.width or own
        if height % unit or width % unit:
            raise ValueError(f"height and width must be multiples of {unit}, got {height}×{width}")
        if settings.cfg_scale > 1 and not network.class_dropout_prob > 0 and self.text is None:
            raise ValueError(
                f"guidance (cfg_scale = {settings.cfg_scale}) needs a network with the label of no "
                "class: it was trained with class_dropout_prob = 0"
            )
        times = {
            name: getattr(self.transport if value is None else settings, name)
            for name, value in (("T_max", settings.T_max), ("T_min", settings.T_min))
        }
        return dataclasses.replace(settings, height=height, width=width, **times)

    def shape(self, settings: Settings) -> tuple[int, int, int]:
        """(C, h, w) of a picture's state, of settings that are filled."""
        side = self._factor
        return self.network.config.in_channels, settings.height // side, settings.width // side

    def decode(self, x: Tensor) -> Tensor:
        """States (B, C, h, w) to pictures (B, 1 or 3, H, W)."""
        return x if self.autoencoder is None else self.autoencoder.decode(x)

    def described(self) -> dict[str, Any]:
        """For run.json: what draws, with SHA-256 of weights (the network's of its files)."""
        parts = self._modules()
        network = file_hash(*self.files) if self.files else state_hash(parts["network"])
        others = {name: state_hash(part) for name, part in parts.items() if name != "network"}
        network_config = self.network.config.items()
        described = {
            "weights": {"network": network, **others},
            "network": {key: value for key, value in network_config if not key.startswith("_")},
            "transport": {"name": type(self.transport).__name__, **vars(self.transport)},
        }
        if self.text is not None:
            names = "max_seq_length", "use_last_hidden_state"
            described["text"] = {name: getattr(self.text, name) for name in names}
        return described

    @property
    def _factor(self) -> int:
        return 1 if self.autoencoder is None else self.autoencoder.factor

    def _modules(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"network": self.network}
        if self.autoencoder is not None:
            parts["autoencoder"] = self.autoencoder.model
        if self.text is not None:
            parts["text_encoder"] = self.text.model
        return parts


def load(
    checkpoint: str | Path, preset_or_config: str | Path | None = None, *,
    dtype: torch.dtype = torch.bfloat16, text_encoder: str | Path | None = None,
) -> Source:  # fmt: skip
    """Of what `tim.opening.open_pipeline` opens, with the same errors; on the CPU.

    Args:
        preset_or_config: of a weight file: a preset's name or a YAML file, whose `model.vae_dir`
            and `model.text_encoder_dir` name the other networks. The others have their own.
        dtype: of network and text encoder, which gets bfloat16 in place of float16. The
            autoencoder is float32, as published.
        text_encoder: a folder or a name on the hub, in place of the configuration's.
    """
    pipeline = open_pipeline(checkpoint, preset_or_config, dtype=dtype, text_encoder=text_encoder)
    settings, text = pipeline.config, None
    if isinstance(pipeline, TiMTextPipeline):
        if pipeline.text_encoder is None or pipeline.tokenizer is None:
            raise ValueError(f"the pipeline {checkpoint} has no text encoder and tokenizer")
        text = TextEncoder(
            pipeline.text_encoder, pipeline.tokenizer, settings.max_seq_length,
            settings.use_last_hidden_state, min_seq_length=settings.min_seq_length,
        )  # fmt: skip
    return Source(
        name=Path(checkpoint).resolve().name.partition(".")[0],
        network=pipeline.transformer,
        transport=transports.make(settings.transport, **(settings.transport_params or {})),
        autoencoder=None if pipeline.vae is None else Autoencoder(pipeline.vae),
        text=text,
        files=weight_files(checkpoint),
    )
