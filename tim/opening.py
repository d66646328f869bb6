"""One door to a trained network, however it was saved."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from omegaconf import DictConfig
from torch import nn

from tim import checkpoints, transports
from tim import config as configs
from tim.encoders import Autoencoder, TextEncoder
from tim.models import TiMTransformer2DModel
from tim.pipelines import TiMClassPipeline, TiMTextPipeline
from tim.pipelines.base import folder_of, is_of_pixels, text_settings, transport_of
from tim.training import load_export
from tim.transports import Transport

M = TypeVar("M", bound=nn.Module)
P = TypeVar("P")
Source = str | Path
_TILE = 2560  # px: longer sides are decoded in tiles, as published
_INDEX = "model_index.json"
_KINDS = {kind.__name__: kind for kind in (TiMClassPipeline, TiMTextPipeline)}


def open_pipeline(
    source: Source, config: Source | None = None, *, dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu", vae: diffusers.ModelMixin | Source | None = None,
    text_encoder: TextEncoder | Source | None = None,
) -> TiMClassPipeline | TiMTextPipeline:  # fmt: skip
    """A network with all that it draws pictures with.

    Args:
        source: the folder of a run or its `model` folder; the folder of a saved pipeline, or its
            name on the hub; or a `.safetensors` or `.bin` file of weights.
        config: of a weight file, a preset's name or a YAML file. The others have their own.
        dtype: of network and text encoder, which gets bfloat16 in place of float16; by default
            float32 on the CPU and bfloat16 elsewhere. The autoencoder is float32, as published.
        vae, text_encoder: in place of the configuration's `vae_dir` and `text_encoder_dir`: what
            was loaded, a folder or a name on the hub. How texts are read stands in the
            configuration.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it is of another kind, or without its configuration; its weights or the other
            networks do not fit; or the configuration is refused by `tim.config`.
        OSError: an autoencoder or text encoder is neither a folder nor to be had from the hub.

    Example::

        pipeline = open_pipeline("c2i_model_256.safetensors", "xl-256", device="cuda")
        pictures = pipeline([207]).images
    """
    device = torch.device(device)
    dtype = dtype or _usual_dtype(device)
    if isinstance(vae, Source):
        vae = _autoencoder(vae)
    if isinstance(text_encoder, Source):
        text_encoder = _text_encoder(text_encoder, dtype)
    if is_pipeline(source):
        _refuse_config(source, config)
        pipeline = _saved(str(source), dtype, vae, text_encoder)
    else:
        network, cfg = open_network(source, config, dtype=dtype)
        pipeline = _of_config(network, cfg, dtype, vae, text_encoder)
    return pipeline.to(device)


def is_pipeline(source: Source) -> bool:
    """Whether it is the folder of a saved pipeline, or may be the name of one on the hub."""
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) is not None
    path = Path(source)
    return (path / _INDEX).is_file() or (is_name and not path.exists() and not path.suffix)


def open_network(
    source: Source, config: Source | None = None, *, dtype: torch.dtype | None = None
) -> tuple[TiMTransformer2DModel, DictConfig]:  # fmt: skip
    """The network alone, on the CPU in eval mode, of a run or a weight file, with its
    configuration; `dtype` is as saved by default.

    Raises:
        FileNotFoundError, ValueError: see `open_pipeline`.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.is_dir():
        _refuse_config(path, config)
        network, _, cfg = load_export(_model_folder(path))
        return _cast(network, dtype), cfg
    if config is None:
        raise ValueError(
            f"{path} needs its configuration: a preset's name ({', '.join(configs.presets())}) "
            "or a YAML file"
        )
    cfg = configs.load(config)
    if "model" not in cfg:
        raise ValueError(f"{config} has no section model, which describes the network")
    return checkpoints.load(path, cfg, dtype=dtype), cfg


def open_sampler(
    source: Source, config: Source | None = None, *, dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[TiMTransformer2DModel, Transport]:  # fmt: skip
    """What states are sampled with, of any source of `open_pipeline`, with the same errors: no
    other networks are needed but those of a saved pipeline."""
    device = torch.device(device)
    dtype = dtype or _usual_dtype(device)
    if is_pipeline(source):
        pipeline = open_pipeline(source, config, dtype=dtype)
        network, has = pipeline.transformer, pipeline.config
        transport = transports.make(has.transport, **(has.transport_params or {}))
    else:
        network, cfg = open_network(source, config, dtype=dtype)
        transport = configs.build_transport(cfg)
    return network.to(device), transport


def weight_files(source: Source) -> tuple[Path, ...]:
    """Those that the network's weights are read from; none of a name on the hub."""
    path = Path(source)
    if not path.is_dir():
        return (path,) if path.is_file() else ()
    folder = path / "transformer" if (path / _INDEX).is_file() else _model_folder(path)
    return tuple(sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")))


def _model_folder(path: Path) -> Path:
    """That of a run, where `path` is the run's."""
    is_run = not (path / "config.json").is_file() and (path / "model").is_dir()
    return path / "model" if is_run else path


def _of_config(
    network: TiMTransformer2DModel, cfg: DictConfig, dtype: torch.dtype,
    vae: diffusers.ModelMixin | None, text: TextEncoder | None,
) -> TiMClassPipeline | TiMTextPipeline:  # fmt: skip
    if vae is None and not is_of_pixels(cfg):
        vae = _autoencoder(folder_of(cfg, "vae_dir", "vae"))
    if network.config.cap_feat_dim is None:
        _refuse_text(text)
        return TiMClassPipeline(network, vae, *transport_of(cfg))
    text = text or _text_encoder(folder_of(cfg, "text_encoder_dir", "text_encoder"), dtype)
    return TiMTextPipeline(
        network, vae, text.model, text.tokenizer, *transport_of(cfg),
        **text_settings(cfg),
    )  # fmt: skip


def _saved(
    source: str, dtype: torch.dtype, vae: diffusers.ModelMixin | None, text: TextEncoder | None
) -> TiMClassPipeline | TiMTextPipeline:  # fmt: skip
    index = _had(DiffusionPipeline.load_config, source, "a saved pipeline")
    kind = _KINDS.get(index["_class_name"])
    if kind is None:
        raise ValueError(f"{source} is a {index['_class_name']}: a {' or '.join(_KINDS)} is needed")
    parts: dict[str, Any] = {} if vae is None else {"vae": vae}
    if kind is TiMClassPipeline:
        _refuse_text(text)
    elif text is not None:
        parts |= {"text_encoder": text.model, "tokenizer": text.tokenizer}
    pipeline = kind.from_pretrained(source, **parts)
    _cast(pipeline.transformer, dtype)
    if kind is TiMTextPipeline and pipeline.text_encoder is not None:
        _cast(pipeline.text_encoder, _text_dtype(dtype))
    return pipeline


def _autoencoder(folder: Source) -> diffusers.ModelMixin:
    load = partial(Autoencoder.load, tile=_TILE)
    return _had(load, folder, "the autoencoder (vae_dir)").model


def _text_encoder(folder: Source, dtype: torch.dtype) -> TextEncoder:
    load = partial(TextEncoder.load, dtype=_text_dtype(dtype))
    return _had(load, folder, "the text encoder (text_encoder_dir)")


def _had(load: Callable[[str], P], name: Source, what: str) -> P:
    """What is loaded of a folder or a name on the hub."""
    try:
        return load(str(name))
    except OSError as error:
        raise OSError(
            f"{what} {name} is neither a folder of one nor to be had from the hub"
        ) from error


def _refuse_config(path: Source, given: Source | None) -> None:
    if given is not None:
        raise ValueError(f"{path} has its own configuration: leave out {given}")


def _refuse_text(given: TextEncoder | None) -> None:
    if given is not None:
        raise ValueError("this network is conditioned on classes: leave out text_encoder")


def _cast(module: M, dtype: torch.dtype | None) -> M:
    return nn.Module.to(
        module, dtype or module.dtype
    )  # diffusers' own warns of layers that there are none of


def _usual_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _text_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float16 else dtype
