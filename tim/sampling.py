"""Any-step sampling (arXiv 2509.04394, section 3.4)."""

from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from tqdm import tqdm

from tim_kernels import transition_step

from .checks import check_finite
from .transports import Transport

SAMPLE_TYPES = ("transition", "ddiffusion")


@torch.no_grad()
def sample(
    model: nn.Module,
    transport: Transport,
    z: Tensor,
    y: Tensor,
    y_null: Tensor | None = None,
    *,
    num_steps: int,
    T_max: float | None = None,
    T_min: float | None = None,
    cfg_scale: float = 1.0,
    cfg_low: float = 0.0,
    cfg_high: float = 1.0,
    stochasticity_ratio: float = 0.0,
    sample_type: str = "transition",
    generator: torch.Generator | list[torch.Generator] | None = None,
    return_trajectory: bool = False,
    progress: bool = False,
    on_step: Callable[[int, float, Tensor], Tensor] | None = None,
) -> Tensor:
    """Carry noise z at T_max to data at T_min in `num_steps` network evaluations.

    z is (B, C, H, W); y is the model's conditioning and y_null, shaped alike, the one that means
    "nothing". Times run linearly from T_max to T_min (the transport's unless given). Classifier-
    free guidance (arXiv 2207.12598) acts where cfg_low·T_max < t < cfg_high·T_max, if
    cfg_scale > 1. "transition" asks the network for F(x, t, r), "ddiffusion" for F(x, t, t).
    `stochasticity_ratio` > 0 adds noise between the first and the last step (OT_FM only), drawn
    from `generator`. The state is kept in float64, the network runs in its own dtype. After each
    step `on_step` is given its index, the time reached and the state; what it returns goes on.
    Returns the data (B, C, H, W) in z's dtype, or with `return_trajectory` all
    (num_steps + 1, B, C, H, W) states. Raises ValueError for inputs that do not fit.
    """
    T_max = transport.T_max if T_max is None else T_max
    T_min = transport.T_min if T_min is None else T_min
    guided = cfg_scale > 1
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not T_max > T_min:
        raise ValueError(f"T_max must exceed T_min, got {T_max} and {T_min}")
    if sample_type not in SAMPLE_TYPES:
        raise ValueError(f"sample_type must be one of {SAMPLE_TYPES}, got {sample_type!r}")
    if guided and y_null is None:
        raise ValueError(f"guidance (cfg_scale = {cfg_scale}) needs y_null")
    if guided and y_null.shape != y.shape:
        raise ValueError(f"y_null must be shaped as y, {tuple(y.shape)}; got {tuple(y_null.shape)}")
    if stochasticity_ratio < 0:
        raise ValueError(f"stochasticity_ratio must not be negative, got {stochasticity_ratio}")
    check_finite("the initial latents z", z)

    dtype = next(model.parameters()).dtype
    batch = z.shape[0]
    both_y = torch.cat((y, y_null)) if guided else None
    times = torch.linspace(T_max, T_min, num_steps + 1, dtype=torch.float64).tolist()
    x = z.to(torch.float64)
    guidance = x.new_full((batch,), cfg_scale)
    states = [x]
    pairs = list(zip(times[:-1], times[1:], strict=True))
    for step, (t, r) in enumerate(tqdm(pairs, disable=not progress)):
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
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        coefficients = transport.step_coefficients(t_batch, r_batch, stochasticity)
        x = transition_step(x, F, coefficients, F_uncond, guidance, noise)
        if on_step is not None:
            x = on_step(step, r, x).to(torch.float64)
        if return_trajectory:
            states.append(x)
    return torch.stack(states).to(z.dtype) if return_trajectory else x.to(z.dtype)


def _network_time(transport: Transport, t: Tensor, dtype: torch.dtype) -> Tensor:
    """c(t), never rounded below float32: t − r is small where steps are many."""
    return transport.network_time(t).to(torch.promote_types(dtype, torch.float32))
