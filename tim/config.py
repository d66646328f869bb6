"""YAML configurations in the published schema, and the objects they describe.

A `target:` is looked up in `TARGETS`; nothing is imported because a file names it.
"""

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tim.models import TiMTransformer2DModel
from tim.objective import TransitionObjective
from tim.transports import TRANSPORTS, Transport

T = TypeVar("T")

_PRESETS = {path.stem: path for path in (Path(__file__).parent / "configs").glob("*.yaml")}
_CLASS_NETWORK = "tim.models.c2i.tim_model.TiM"
_TEXT_NETWORK = "tim.models.t2i.tim_model.TiM"

# The published names and ours.
TARGETS: dict[str, type] = {
    _CLASS_NETWORK: TiMTransformer2DModel,
    _TEXT_NETWORK: TiMTransformer2DModel,
    "tim.models.TiMTransformer2DModel": TiMTransformer2DModel,
    **{f"tim.schedulers.transports.{name}": cls for name, cls in TRANSPORTS.items()},
    **{f"tim.transports.{cls.__name__}": cls for cls in TRANSPORTS.values()},
    "torch.optim.AdamW": torch.optim.AdamW,
}


def presets() -> list[str]:
    """The names of the shipped configurations, sorted."""
    return sorted(_PRESETS)


def load(name_or_path: str | Path) -> DictConfig:
    """The preset of that name, or the YAML file at that path.

    Raises:
        ValueError: neither a preset nor a file, or a file that is not a YAML mapping.
    """
    path = _PRESETS.get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        raise ValueError(
            f"{str(name_or_path)!r} is neither a preset ({', '.join(presets())}) nor a YAML file"
        )
    try:
        cfg = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a YAML mapping: {error}") from error
    if not isinstance(cfg, DictConfig):
        raise ValueError(f"{path} is not a YAML mapping but a list")
    if OmegaConf.select(cfg, "model.unified_dcm_loss") is not None:  # its name in early files
        cfg.model.transition_loss = cfg.model.pop("unified_dcm_loss")
    return cfg


def resolve(target: str) -> type:
    """The class behind a `target:` name.

    Raises:
        ValueError: a name that is not in `TARGETS`.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known are {', '.join(TARGETS)}")
    return TARGETS[target]


def construct(cls: type[T], params: Mapping[str, Any], *args: Any) -> T:
    """`cls(*args, **params)`.

    Raises:
        ValueError: `params` names something that the constructor does not take.
    """
    known = _parameters(cls)
    if unknown := [name for name in params if name not in known]:
        raise ValueError(
            f"{cls.__name__} has no parameter {', '.join(unknown)}; it takes {', '.join(known)}"
        )
    return cls(*args, **params)


def build_network(cfg: DictConfig) -> TiMTransformer2DModel:
    """The freshly initialised network of `model.network`.

    Raises:
        ValueError: the section is missing, its target is no network or disagrees with
            `cap_feat_dim` about the conditioning, or a parameter is unknown.
    """
    cls, params = _target(cfg, "model.network", TiMTransformer2DModel)
    target, width = cfg.model.network.target, params.get("cap_feat_dim")
    if target == (_TEXT_NETWORK if width is None else _CLASS_NETWORK):
        needed = "a text width" if target == _TEXT_NETWORK else "none"
        raise ValueError(f"{target} needs {needed} as cap_feat_dim, got {width}")
    return construct(cls, params)


def build_transport(cfg: DictConfig) -> Transport:
    """The transport of `model.transport`.

    Raises:
        ValueError: the section is missing, its target is no transport, or a parameter is unknown.
    """
    return construct(*_target(cfg, "model.transport", Transport))


def build_objective(cfg: DictConfig) -> TransitionObjective:
    """The objective of `model.transition_loss` over the transport of `model.transport`.

    Raises:
        ValueError: a section is missing, or a parameter is unknown.
    """
    schedule = _section(cfg, "model.transition_loss")
    return construct(TransitionObjective, schedule, build_transport(cfg))


def build_optimizer(cfg: DictConfig, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of `training.optimizer` at `training.learning_rate`, not scaled by the batch.

    Raises:
        ValueError: the section is missing, its target is no optimizer, or a parameter is unknown.
    """
    cls, settings = _target(cfg, "training.optimizer", torch.optim.Optimizer)
    return construct(cls, {"lr": cfg.training.learning_rate, **settings}, params)


def _parameters(cls: type) -> list[str]:
    """The constructor's names; those of its `**rest` are the next base's."""
    own = inspect.signature(cls).parameters.values()
    names = [p.name for p in own if p.kind is not p.VAR_KEYWORD]
    return names if len(names) == len(own) else names + _parameters(cls.__base__)


def _target(cfg: DictConfig, key: str, base: type[T]) -> tuple[type[T], dict[str, Any]]:
    section = _section(cfg, key)
    cls = resolve(section.get("target"))
    if not issubclass(cls, base):
        raise ValueError(f"{key}.target must be a {base.__name__}, got {section['target']}")
    return cls, section.get("params") or {}


def _section(cfg: DictConfig, key: str) -> dict[str, Any]:
    section = OmegaConf.select(cfg, key)
    if not isinstance(section, DictConfig):
        raise ValueError(f"the configuration has no section {key}, got {section!r}")
    return OmegaConf.to_container(section, resolve=True)
