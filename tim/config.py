"""YAML configurations in the published schema, and the objects they describe.

A `target:` is looked up in `TARGETS`; nothing is imported because a file names it.
"""

import inspect
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tim.checks import closest
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
            + closest(str(name_or_path), _PRESETS)
        )
    try:
        cfg = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a YAML mapping: {_line(error)}") from error
    if not isinstance(cfg, DictConfig):
        raise ValueError(f"{path} is not a YAML mapping but a list")
    if OmegaConf.select(cfg, "model.unified_dcm_loss") is not None:  # its name in early files
        cfg.model.transition_loss = cfg.model.pop("unified_dcm_loss")
    return cfg


def override(cfg: DictConfig, assignments: Iterable[str]) -> DictConfig:
    """`cfg` changed by each "key=value", such as "training.seed=1".

    Raises:
        ValueError: one has no such form, or its value is no YAML.
    """
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        if not re.fullmatch(r"\w+(\.\w+)*", key) or value.strip() in ("", "???"):
            raise ValueError(f"{assignment!r} must be key=value (null for none)")
        try:
            cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist([assignment]))
        except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:
            raise ValueError(f"{assignment!r} cannot be read: {_line(error)}") from error
    return cfg


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """`cfg` as plain values, its ${…} filled in.

    Raises:
        ValueError: one refers to nothing, or a value is missing.
    """
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"the configuration cannot be resolved: {_line(error)}") from error


def flat(cfg: DictConfig) -> dict[str, Any]:
    """Every setting by its dotted name, such as "training.seed"."""
    return dict(leaves(resolved(cfg)))


def leaves(
    tree: Mapping[Any, Any], whole: Collection[str] = (), prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value; those in `whole` are not entered."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key not in whole:
            yield from leaves(value, whole, f"{key}.")
        else:
            yield key, value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def resolve(target: str) -> type:
    """The class behind a `target:` name.

    Raises:
        ValueError: a name that is not in `TARGETS`.
    """
    if target not in TARGETS:
        raise ValueError(
            f"unknown target {target!r}{closest(str(target), TARGETS)}; "
            f"known are {', '.join(TARGETS)}"
        )
    return TARGETS[target]


def construct(cls: type[T], params: Mapping[str, Any], *args: Any, section: str = "") -> T:
    """`cls(*args, **params)`.

    Raises:
        ValueError: `params`, of that section of a configuration, names something that the
            constructor does not take, or has a value that is not of the annotated kind.
    """
    known = _parameters(cls)
    if unknown := [name + closest(name, known) for name in params if name not in known]:
        raise ValueError(
            f"{section or cls.__name__} has no parameter {', '.join(unknown)}; "
            f"it takes {', '.join(known)}"
        )
    prefix = f"{section}." if section else ""
    for name, value in params.items():
        if not _fits(value, known[name]):
            kind = known[name]
            names = get_args(kind) if get_origin(kind) is Literal else ()
            needed = f"one of {', '.join(names)}" if names else inspect.formatannotation(kind)
            raise ValueError(f"{prefix}{name} must be {needed}, got {value!r}")
    try:
        return cls(*args, **params)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{section or cls.__name__}: {_line(error)}") from error


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
    is_checkpointed = params.pop("use_checkpoint", False)  # its published name
    if not isinstance(is_checkpointed, bool):
        raise ValueError(
            f"model.network.params.use_checkpoint must be true or false, got {is_checkpointed!r}"
        )
    network = construct(cls, params, section="model.network.params")
    if is_checkpointed:
        network.enable_gradient_checkpointing()
    return network


def build_transport(cfg: DictConfig) -> Transport:
    """The transport of `model.transport`.

    Raises:
        ValueError: the section is missing, its target is no transport, or a parameter is unknown.
    """
    cls, params = _target(cfg, "model.transport", Transport)
    return construct(cls, params, section="model.transport.params")


def build_objective(cfg: DictConfig) -> TransitionObjective:
    """The objective of `model.transition_loss` over the transport of `model.transport`.

    Raises:
        ValueError: a section is missing, or a parameter is unknown.
    """
    section = "model.transition_loss"
    transport = build_transport(cfg)
    return construct(TransitionObjective, _section(cfg, section), transport, section=section)


def build_optimizer(cfg: DictConfig, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of `training.optimizer` at `training.learning_rate`, not scaled by the batch.

    Raises:
        ValueError: the section is missing, its target is no optimizer, or a parameter is unknown.
    """
    cls, settings = _target(cfg, "training.optimizer", torch.optim.Optimizer)
    settings = {"lr": cfg.training.learning_rate, **settings}
    return construct(cls, settings, params, section="training.optimizer.params")


def _parameters(cls: type) -> dict[str, Any]:
    """The constructor's names and annotations; those of its `**rest` are the next base's."""
    own, hints = inspect.signature(cls).parameters.values(), get_type_hints(cls.__init__)
    found = {p.name: hints.get(p.name, Any) for p in own if p.kind is not p.VAR_KEYWORD}
    return found if len(found) == len(own) else found | _parameters(cls.__base__)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value read from YAML is what an annotation says."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        is_list = isinstance(value, (list, tuple)) and len(value) == len(args)
        return is_list and all(map(_fits, value, args))
    if kind in (int, float):
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    return not isinstance(kind, type) or isinstance(value, kind)


def _target(cfg: DictConfig, key: str, base: type[T]) -> tuple[type[T], dict[str, Any]]:
    section = _section(cfg, key)
    cls = resolve(section.get("target"))
    if not issubclass(cls, base):
        raise ValueError(f"{key}.target must be a {base.__name__}, got {section['target']}")
    params = section.get("params") or {}
    if section.keys() - {"target", "params"} or not isinstance(params, dict):
        raise ValueError(f"{key} must have a target and its params, got {section}")
    return cls, params


def _section(cfg: DictConfig, key: str) -> dict[str, Any]:
    section = OmegaConf.select(cfg, key)
    if not isinstance(section, DictConfig):
        raise ValueError(f"the configuration has no section {key}, got {section!r}")
    return resolved(section)
