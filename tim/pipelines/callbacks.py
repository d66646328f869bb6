"""What a call tells after each step, and what it takes back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

States = Tensor | list[Tensor]  # a list of those of several sizes
StepCallback = Callable[[DiffusionPipeline, int, float, dict[str, Any]], dict[str, Any] | None]
_ONLY_LATENTS = (
    "callback_on_step_end cannot change {}, only latents: what a picture is of is read once a call"
)


def inputs_of(
    callback: StepCallback | None, names: Sequence[str], known: Sequence[str]
) -> list[str]:
    """The tensors that a callback is given, by name.

    Raises:
        ValueError: some are not known, or the callback cannot be called.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end must be a function, got {callback!r}")
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        names = callback.tensor_inputs
    if not isinstance(names, (list, tuple)) or any(name not in known for name in names):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs must be of {', '.join(known)}; got {names!r}"
        )
    return list(names)


def on_step(
    pipeline: DiffusionPipeline,
    callback: StepCallback,
    names: Sequence[str],
    conditions: Mapping[str, Any],
) -> Callable[[int, float, States], States]:
    """A sampler's `on_step` that asks the callback of a pipeline."""
    made = {name: _writes(x) for name, x in conditions.items()}

    def ask(step: int, time: float, state: States) -> States:
        known = dict(conditions) | {"latents": state}
        returned = callback(pipeline, step, time, {name: known[name] for name in names})
        for name, x in conditions.items():
            if _writes(x) != made[name]:
                raise ValueError(_ONLY_LATENTS.format(name))
        return _taken(returned, state, conditions)

    return ask


def _taken(returned: Any, state: States, conditions: Mapping[str, Any]) -> States:
    """What a callback made of the state."""
    if returned is None:
        return state
    if isinstance(returned, Mapping):
        for name in returned.keys() - {"latents"}:
            if name not in conditions or returned[name] is not conditions[name]:
                raise ValueError(_ONLY_LATENTS.format(name))
    latents = returned.get("latents", state) if isinstance(returned, Mapping) else None
    needed, got = ([getattr(x, "shape", None) for x in _rows(each)] for each in (state, latents))
    if type(latents) is not type(state) or got != needed:
        shape = tuple(state.shape) if isinstance(state, Tensor) else [*map(tuple, needed)]
        raise ValueError(
            f"callback_on_step_end must return nothing or {{'latents': …}} of shape {shape}, "
            f"got {type(returned).__name__}"
        )
    return latents


def _writes(x: Tensor | None) -> int | None:
    """How often a tensor was written to, where that is counted."""
    return None if x is None or x.is_inference() else x._version


def _rows(state: Any) -> list[Any]:
    return state if isinstance(state, list) else [state]
