"""w(t, r), what a transition weighs in the loss (arXiv 2509.04394, section 3.3)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

TimeWeight = Literal["constant", "reciprocal", "sqrt", "square", "Soft-Min-SNR"]
TIME_WEIGHTS: dict[TimeWeight, Callable[[Tensor, float], Tensor]] = {
    "constant": lambda delta, sigma_d: torch.ones_like(delta),
    "reciprocal": lambda delta, sigma_d: 1 / (delta + sigma_d),
    "sqrt": lambda delta, sigma_d: (delta + sigma_d).rsqrt(),
    "square": lambda delta, sigma_d: (delta + sigma_d) ** -2,
    "Soft-Min-SNR": lambda delta, sigma_d: 1 / (delta**2 + sigma_d**2),
}


def time_weight(
    t: Tensor,
    r: Tensor,
    sigma_d: float,
    *,
    weight_time_type: TimeWeight = "constant",
    weight_t_and_r: bool = True,
    weight_time_tangent: bool = False,
    weight_time_sigmoid: bool = False,
) -> Tensor:
    """w(t, r) of times (B,), shaped alike; 1 where r = t.

    A function of `TIME_WEIGHTS`, of δ = t − r or, without `weight_t_and_r`, of t. t and r go
    through tan with `weight_time_tangent`, else through t/(1 − t) with `weight_time_sigmoid`.
    """
    is_diffusion = r == t
    if weight_time_tangent:
        t, r = torch.tan(t), torch.tan(r)
    elif weight_time_sigmoid:
        t, r = t / (1 - t), r / (1 - r)
    delta = t - r if weight_t_and_r else t
    weight = TIME_WEIGHTS[weight_time_type](delta, sigma_d)
    return torch.where(is_diffusion, torch.ones_like(weight), weight)
