"""Every setting of `tim train`: what it may be, its default, and which are not used."""

import inspect
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from tim import config
from tim.checks import closest
from tim.models import TiMTransformer2DModel
from tim.objective import TransitionObjective
from tim.training.conditioning import TextConditioning
from tim.training.parts import Parts
from tim.training.trackers import PACKAGES

_log = logging.getLogger(__name__)


class _Rule(NamedTuple):
    needed: str
    fits: Callable[[Any], bool]


def _whole(least: int) -> _Rule:
    return _Rule(
        f"a whole number of at least {least}", lambda value: type(value) is int and value >= least
    )


def _number(needed: str, fits: Callable[[float], bool]) -> _Rule:
    def is_one(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and fits(value)

    return _Rule(needed, is_one)


def _one_of(*known: Any) -> _Rule:
    names = ", ".join("null" if name is None else str(name) for name in known)
    pairs = [(type(name), name) for name in known]  # 0 is no False
    return _Rule(f"one of {names}", lambda value: (type(value), value) in pairs)


def _path(needed: str, *words: str) -> _Rule:
    def is_one(value: Any) -> bool:
        return value is None or value in words or isinstance(value, str) and Path(value).exists()

    return _Rule(needed, is_one)


def _are_prompts(value: Any) -> bool:
    if value is None:
        return True
    is_list = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return is_list and 0 < len({*value}) == len(value)


_POSITIVE = _number("a positive number", lambda value: value > 0)
_NOT_NEGATIVE = _number("a number, 0 or more", lambda value: value >= 0)
_SHARE = _number("a number in [0, 1]", lambda value: 0 <= value <= 1)
_FLAG = _Rule("true or false", lambda value: isinstance(value, bool))
_TEXT = _Rule("a text", lambda value: isinstance(value, str))
_SECTION = _Rule("a section", lambda value: isinstance(value, dict))  # its builder checks the rest
_TEXT_OR_NONE = _Rule("a text or null", lambda value: value is None or isinstance(value, str))
_WHOLE_OR_NONE = _Rule(
    "a whole number of at least 1 or null", lambda value: value is None or _whole(1).fits(value)
)
_SECTION_OR_NONE = _Rule("a section or null", lambda value: value is None or _SECTION.fits(value))
_STEPS_OR_NONE = _Rule(
    "a list of steps or null",
    lambda value: value is None or isinstance(value, list) and all(map(_whole(1).fits, value)),
)
_PROMPTS_OR_NONE = _Rule("a list of different texts or null", _are_prompts)
_LABELS_OR_NONE = _Rule(
    "a list of labels or null",
    lambda value: (
        value is None or isinstance(value, list) and value and all(map(_whole(0).fits, value))
    ),
)
_SCHEDULES = [  # as functions of the step
    kind.value for kind in SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")
]

RULES: dict[str, _Rule] = {
    "model.ckpt": _path("null or a file of weights"),
    "model.transport": _SECTION,
    "model.transition_loss": _SECTION,
    "model.network": _SECTION,
    "model.proj_coeff": _NOT_NEGATIVE,
    "model.use_ema": _FLAG,
    "model.ema_decay": _SHARE,
    "model.ema_warmup": _FLAG,
    "model.vae_dir": _TEXT_OR_NONE,
    "model.enc_dir": _TEXT_OR_NONE,
    "model.text_encoder_dir": _TEXT_OR_NONE,
    "model.proportion_empty_prompts": _SHARE,
    "model.use_last_hidden_state": _FLAG,
    "model.escape_captions": _FLAG,
    "model.min_seq_length": _whole(1),
    "model.max_seq_length": _whole(1),
    "model.keep_text_features": _FLAG,
    "data.data_type": _TEXT,
    "data.dataset": _SECTION_OR_NONE,
    "data.pack_tokens": _WHOLE_OR_NONE,
    "data.dataloader.num_workers": _whole(0),
    "data.dataloader.batch_size": _whole(1),
    "training.seed": _whole(0),
    "training.max_train_steps": _whole(1),
    "training.checkpointing_steps": _whole(1),
    "training.checkpoints_total_limit": _whole(1),
    "training.checkpoint_list": _STEPS_OR_NONE,
    "training.resume_from_checkpoint": _path("latest, null or a checkpoint's folder", "latest"),
    "training.parallel": _one_of("ddp", "fsdp2"),
    "training.fsdp_group_size": _WHOLE_OR_NONE,
    "training.compile": _FLAG,
    "training.tracker": _one_of(None, *PACKAGES),
    "training.tracker_project_name": _TEXT_OR_NONE,
    "training.tracker_kwargs": _SECTION_OR_NONE,
    "training.lora": _SECTION_OR_NONE,
    "training.learning_rate": _NOT_NEGATIVE,
    "training.learning_rate_base_batch_size": _whole(1),
    "training.scale_lr": _FLAG,
    "training.lr_scheduler": _one_of(*_SCHEDULES),
    "training.lr_scheduler_params": _SECTION_OR_NONE,
    "training.lr_warmup_steps": _whole(0),
    "training.gradient_accumulation_steps": _whole(1),
    "training.optimizer": _SECTION,
    "training.max_grad_norm": _NOT_NEGATIVE,  # 0 clips nothing, as published
    "training.mixed_precision": _one_of("no", False, "bf16"),  # YAML reads an unquoted no as false
    "training.allow_tf32": _FLAG,
    "training.log_steps": _whole(1),
    "training.validation_steps": _whole(1),
    "training.validation_prompts": _PROMPTS_OR_NONE,
    "training.validation_labels": _LABELS_OR_NONE,
}
DEFAULTS = {
    "model": {
        "ckpt": None,
        "ema_warmup": False,
        "vae_dir": None,
        "enc_dir": None,
        "text_encoder_dir": None,
        "proportion_empty_prompts": 0.1,
        "use_last_hidden_state": True,
        "escape_captions": False,  # as the released network's were, if true
        "min_seq_length": 1,
        "max_seq_length": 256,
        "keep_text_features": False,
    },
    "data": {"dataset": None, "pack_tokens": None},
    "training": {
        "seed": 0,
        "log_steps": 50,
        "checkpoint_list": None,
        "lr_scheduler_params": None,
        "parallel": "ddp",
        "fsdp_group_size": None,
        "compile": False,
        "tracker": None,
        "tracker_project_name": None,
        "tracker_kwargs": None,
        "validation_prompts": None,
        "validation_labels": None,
        "lora": None,
    },
}
# What published files also hold.
UNUSED = {"model.enc_type", "training.proportion_empty_prompts", "training.fsdp_config"}


def checked(cfg: DictConfig) -> DictConfig:
    """`cfg` with the defaults, when every setting is known and may be what it is.

    A warning names the published settings that are not used.

    Raises:
        ValueError: settings are unknown, missing or wrong; all are named.
    """
    given = OmegaConf.create(OmegaConf.to_container(cfg))  # whatever its flags forbid
    for section, defaults in DEFAULTS.items():
        own = given.get(section, {})
        if isinstance(own, (dict, DictConfig)):
            given[section] = OmegaConf.merge(own, defaults, own)
    plain = config.resolved(given)
    known, problems = {*RULES, *UNUSED}, []
    found = dict(config.leaves(plain, known))
    for key, value in found.items():
        if key in RULES:
            if not RULES[key].fits(value):
                problems.append(f"{key} must be {RULES[key].needed}, got {value!r}")
        elif key not in UNUSED:
            is_section = any(name.startswith(f"{key}.") for name in known)
            wrong = f"must be a section, got {value!r}" if is_section else "is no setting"
            problems.append(f"{key} {wrong}{'' if is_section else closest(key, known)}")
    if missing := [key for key in RULES if key not in found]:
        problems.append(f"the configuration has no {', '.join(missing)}")
    if problems:
        raise ValueError("; ".join(problems))
    if unused := [key for key in found if key in UNUSED]:
        _log.warning("not used by tim train: %s", ", ".join(unused))
    return OmegaConf.create(plain)


def check_fit(
    cfg: DictConfig, network: TiMTransformer2DModel, objective: TransitionObjective, parts: Parts
) -> None:
    """Refuse a network or a loss that cannot take the data.

    Raises:
        ValueError: in so many words.
    """
    has, shape, kind = network.config, tuple(parts.sample_shape), cfg.data.data_type
    size = (has.in_channels, has.input_size, has.input_size)
    is_text, has_text = (
        has.cap_feat_dim is not None,
        isinstance(parts.conditioning, TextConditioning),
    )
    classes = parts.dataset.num_classes or 1
    is_enhanced = objective.transport.enhance_target
    needs = {
        f"cap_feat_dim must be null: {kind} has labels and no text": has_text or not is_text,
        f"cap_feat_dim must be the text's width: {kind} has no labels": is_text or not has_text,
        f"in_channels and input_size must be those of {kind}, {shape}; got {size}": size == shape,
        f"patch_size must divide the input_size {has.input_size}, got {has.patch_size}": (
            has.input_size % has.patch_size == 0
        ),
        f"num_classes must be at least {classes} for {kind}, got {has.num_classes}": (
            is_text or has.num_classes >= classes
        ),
        "class_dropout_prob must be positive for an enhanced target, got 0": (
            is_text or has.class_dropout_prob > 0 or not is_enhanced
        ),
    }
    for need, is_met in needs.items():
        if not is_met:
            raise ValueError(f"model.network.params.{need}")
    if is_enhanced and not cfg.model.use_ema:
        raise ValueError("model.use_ema must be true for an enhanced target, got False")
    if cfg.model.proj_coeff and parts.repa is None:
        raise ValueError(
            f"model.proj_coeff must be 0, got {cfg.model.proj_coeff}: there is no vision encoder "
            "whose features the network's could be aligned with"
        )
    if parts.repa is not None and network.projector is None:
        raise ValueError("model.network.params.projector_dim must be a width for a vision encoder")
    if cfg.training.compile and objective.derivative_type == "jvp":
        raise ValueError("training.compile must be false for derivative_type jvp, got True")


def build_schedule(run: DictConfig, optimizer: Optimizer) -> LambdaLR:
    """The learning rate's course over the steps, of the section `training`.

    Raises:
        ValueError: `lr_scheduler_params` does not fit `lr_scheduler`.
    """
    make = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(run.lr_scheduler)]
    steps = {"num_warmup_steps": run.lr_warmup_steps, "num_training_steps": run.max_train_steps}
    takes = inspect.signature(make).parameters
    if run.lr_warmup_steps and "num_warmup_steps" not in takes:
        _log.warning("not used: training.lr_warmup_steps, of which %s has none", run.lr_scheduler)
    params = {name: value for name, value in steps.items() if name in takes}
    params |= run.lr_scheduler_params or {}
    try:
        return make(optimizer, **params)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"training.lr_scheduler_params {run.lr_scheduler_params} do not fit "
            f"training.lr_scheduler {run.lr_scheduler}: {error}"
        ) from error


# What all of a run is made of. (The network is compared with a checkpoint's; folders may move.)
FIXED = ("training.seed", "data.data_type", "data.dataset.image_size")
FIXED += tuple(f"training.lora.{name}" for name in ("rank", "alpha", "target_modules"))


def check_changes(differs: list[str], output: Path) -> None:
    """Refuse to go on with what would make it another run.

    Raises:
        ValueError: one of `changes` is of a key in `FIXED`.
    """
    if wrong := [change for change in differs if change.split()[0] in FIXED]:
        raise ValueError(
            f"the run in {output} cannot go on with {', '.join(wrong)}: choose another folder"
        )


def changes(before: Path, now: DictConfig) -> list[str]:
    """Each setting that differs from those in a file, as "training.seed 0 → 1"."""
    try:
        was = config.flat(config.load(before))
    except ValueError as error:
        return [f"settings of now, as {error}"]
    is_now = config.flat(now)
    keys = [key for key in {**is_now, **was} if was.get(key) != is_now.get(key)]
    return [f"{key} {was.get(key)} → {is_now.get(key)}" for key in keys]
