"""The sampler's loop: one network evaluation and one step at a time."""

import math
from collections.abc import Callable
from typing import Literal, SupportsIndex, get_args

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from tqdm import tqdm

from tim.checks import check_computed, check_finite, whole
from tim.transports import Transport
from tim_kernels import transition_step

SampleType = Literal["transition", "ddiffusion"]
Generators = torch.Generator | list[torch.Generator] | Callable[[Tensor], Tensor] | None
SAMPLE_TYPES: tuple[SampleType, ...] = get_args(SampleType)


@torch.no_grad()
def sample(
    model: nn.Module,
    transport: Transport,
    z: Tensor,
    y: Tensor,
    y_null: Tensor | None = None,
    *,
    num_steps: SupportsIndex,
    T_max: float | None = None,
    T_min: float | None = None,
    cfg_scale: float = 1.0,
    cfg_low: float = 0.0,
    cfg_high: float = 1.0,
    stochasticity_ratio: float = 0.0,
    sample_type: SampleType = "transition",
    generator: Generators = None,
    return_trajectory: bool = False,
    progress: bool = False,
    on_step: Callable[[int, float, Tensor], Tensor] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Carry the state z at T_max to data at T_min in `num_steps` network evaluations.

    Args:
        z: the state itself, (B, C, H, W): `transport.initial_state(noise)` for noise of variance 1.
        y, y_null: the model's conditioning and, shaped alike, the one that means "nothing".
        num_steps: times run linearly from T_max to T_min.
        T_max, T_min: the transport's unless given.
        cfg_scale: classifier-free guidance (arXiv 2207.12598), two evaluations a step; 1 is none.
        cfg_low, cfg_high: guidance acts where cfg_low·T_max < t < cfg_high·T_max.
        stochasticity_ratio: noise added between the first and the last step (OT_FM only).
        sample_type: "transition" asks the network for F(x, t, r), "ddiffusion" for F(x, t, t).
        generator: of the added noise; one, or one a sample, or a function that makes it of a state.
        return_trajectory: return all num_steps + 1 states.
        progress: show a bar.
        on_step: given each step's index, the time reached and the state; what it returns goes on.
        should_stop: asked before each step; where it says so, the state reached is returned.

    Returns the data (B, C, H, W) or the trajectory (num_steps + 1, B, C, H, W), in z's dtype. In
    between the state is float64; the network runs in its own dtype.

    Raises:
        ValueError: options out of range, y_null missing or not shaped as y, z not finite.
        FloatingPointError: the samples are not finite, as where float16 overflows in the network.
    """
    T_max = transport.T_max if T_max is None else T_max
    T_min = transport.T_min if T_min is None else T_min
    guided = cfg_scale > 1
    num_steps = whole("num_steps", num_steps, 1)
    _check_options(T_max, T_min, sample_type, stochasticity_ratio, cfg_scale)
    if guided:
        _check_guidance(cfg_scale, y, y_null)
    check_finite("the initial state z", z)

    dtype, batch = next(model.parameters()).dtype, z.shape[0]
    both_y = torch.cat((y, y_null)) if guided else None
    x = z.to(torch.float64)
    guidance = x.new_full((batch,), cfg_scale)
    states = [x]
    times = torch.linspace(T_max, T_min, num_steps + 1, dtype=torch.float64).tolist()
    pairs = list(zip(times[:-1], times[1:], strict=True))
    for step, (t, r) in enumerate(tqdm(pairs, disable=not progress)):
        if should_stop is not None and should_stop():
            break
        t_batch, r_batch = x.new_full((batch,), t), x.new_full((batch,), r)
        target = r_batch if sample_type == "transition" else t_batch
        now, then = (_network_time(transport, time, dtype) for time in (t_batch, target))
        if guided and cfg_low * T_max < t < cfg_high * T_max:
            both = model(x.to(dtype).repeat(2, 1, 1, 1), now.repeat(2), then.repeat(2), both_y)
            F, F_uncond = both.chunk(2)
        else:
            F, F_uncond = model(x.to(dtype), now, then, y), None
        stochasticity, noise = 0.0, None
        if stochasticity_ratio and t < T_max and r > T_min:
            stochasticity = stochasticity_ratio
            noise = drawn(x, generator)
        coefficients = transport.step_coefficients(t_batch, r_batch, stochasticity)
        x = transition_step(x, F, coefficients, F_uncond, guidance, noise)
        if on_step is not None:
            x = on_step(step, r, x).to(torch.float64)
        if return_trajectory:
            states.append(x)
    check_computed("the samples", x, "the network", dtype)
    return torch.stack(states).to(z.dtype) if return_trajectory else x.to(z.dtype)


def drawn(x: Tensor, generator: Generators) -> Tensor:
    """Noise shaped as x."""
    if generator is not None and not isinstance(generator, (torch.Generator, list, tuple)):
        return generator(x)
    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _network_time(transport: Transport, t: Tensor, dtype: torch.dtype) -> Tensor:
    """c(t), never rounded below float32: t − r is small where steps are many."""
    return transport.network_time(t).to(torch.promote_types(dtype, torch.float32))


def _check_options(T_max, T_min, sample_type, stochasticity_ratio, cfg_scale) -> None:
    if not T_max > T_min:
        raise ValueError(f"T_max must exceed T_min, got {T_max} and {T_min}")
    if sample_type not in SAMPLE_TYPES:
        raise ValueError(f"sample_type must be one of {SAMPLE_TYPES}, got {sample_type!r}")
    if not 0 <= stochasticity_ratio < math.inf:
        raise ValueError(f"stochasticity_ratio must not be negative, got {stochasticity_ratio}")
    if not math.isfinite(cfg_scale):
        raise ValueError(f"cfg_scale must be finite, got {cfg_scale}")


def _check_guidance(cfg_scale: float, y: Tensor, y_null: Tensor | None) -> None:
    if y_null is None:
        raise ValueError(f"guidance (cfg_scale = {cfg_scale}) needs y_null")
    if y_null.shape != y.shape:
        raise ValueError(f"y_null must be shaped as y, {tuple(y.shape)}; got {tuple(y_null.shape)}")
