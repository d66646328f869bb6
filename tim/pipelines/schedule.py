"""The times of a call's steps: evenly spaced, one's own, or those of a scheduler of diffusers."""

import copy
from collections.abc import Iterable
from typing import Any, SupportsIndex

import torch

from tim.checks import whole
from tim.sampling.steps import decreasing
from tim.transports import Transport
from tim.transports.ot_fm import OTFM

STEPS = 8  # of a call that says nothing
FLOWS = "FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"
_CHANGED = "use_dynamic_shifting", "stochastic_sampling", "invert_sigmas"


def check_scheduler(scheduler: Any, transport: Transport) -> None:
    """Refuse a scheduler that does not step as the transport does.

    Raises:
        ValueError: it is no flow's, the transport is not OT_FM from 1 to 0, or one of its settings
            makes other steps.
    """
    if scheduler is None:
        return
    name = type(scheduler).__name__
    if name not in FLOWS:
        raise ValueError(
            f"scheduler must be a {' or a '.join(FLOWS)}, which step as OT_FM does, got a {name}: "
            "other transports step by themselves, without a scheduler"
        )
    if not isinstance(transport, OTFM) or (transport.T_max, transport.T_min) != (1, 0):
        raise ValueError(
            f"a {name} steps as OT_FM from 1 to 0 does, not {type(transport).__name__} from "
            f"{transport.T_max:g} to {transport.T_min:g}: leave the scheduler out"
        )
    for option in _CHANGED:
        if scheduler.config.get(option):
            raise ValueError(f"a {name} with {option} makes other steps than this network's")


def steps_of(
    transport: Transport,
    scheduler: Any,
    num_inference_steps: SupportsIndex,
    sigmas: Iterable[float] | None,
    timesteps: Iterable[float] | None,
) -> dict[str, Any]:
    """`num_steps` or `times` of a sampler.

    Of a call's own, each step's start: `sigmas` are shares of noise, `timesteps` the transport's
    times, or where there is a scheduler its own. The last step ends at T_min.

    Raises:
        ValueError: both are given; they do not decrease from T_max; another number of steps.
    """
    num_steps = whole("num_inference_steps", num_inference_steps, 1)
    check_scheduler(scheduler, transport)
    if sigmas is not None and timesteps is not None:
        raise ValueError("sigmas and timesteps were given: one of them is needed")
    if sigmas is not None and not isinstance(transport, OTFM):
        raise ValueError(
            f"sigmas are shares of noise, times of OT_FM: give {type(transport).__name__} timesteps"
        )
    name, given = ("sigmas", sigmas) if timesteps is None else ("timesteps", timesteps)
    if given is None and scheduler is None:
        return dict(num_steps=num_steps)
    if given is None:
        starts = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1].tolist()
    else:
        is_scaled = scheduler is not None and timesteps is not None
        unit = scheduler.config.num_train_timesteps if is_scaled else 1
        starts = [start / unit for start in _numbers(name, given)]
        _check_starts(name, starts, transport, num_steps)
    if scheduler is not None:
        scheduler = copy.copy(scheduler)  # other calls may be using it
        scheduler.set_timesteps(sigmas=starts)
        return dict(times=decreasing("the scheduler's sigmas", scheduler.sigmas.tolist()))
    return dict(times=(*starts, transport.T_min))


def count_of(options: dict[str, Any]) -> int:
    """Steps of what `steps_of` gave."""
    return options.get("num_steps") or len(options["times"]) - 1


def _numbers(name: str, given: Iterable[float]) -> list[float]:
    try:
        if isinstance(given, str):
            raise TypeError
        return [float(start) for start in given]
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, got {given!r}") from None


def _check_starts(name: str, starts: list[float], transport: Transport, num_steps: int) -> None:
    if num_steps not in (STEPS, len(starts)):
        raise ValueError(
            f"{len(starts)} {name} are as many steps, not num_inference_steps = {num_steps}"
        )
    decreasing(f"{name} and T_min", (*starts, transport.T_min))
    if abs(starts[0] - transport.T_max) > 1e-6 * transport.T_max:
        raise ValueError(
            f"{name} must begin at T_max = {transport.T_max:g}, where the state is noise; "
            f"got {starts[0]:g}"
        )
