import torch
from torch import Tensor

from ..checks import accumulation_dtype
from ..coefficients import per_sample, weighted_sum


def transition_step(
    x: Tensor,
    F_cond: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor | None],
    F_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """a x + b F + c noise with F = F_u + g (F_c − F_u)."""
    dtype = accumulation_dtype(x)
    F = F_cond
    if F_uncond is not None:
        F, F_uncond, guidance = F.to(dtype), F_uncond.to(dtype), guidance.to(dtype)
        F = F_uncond + per_sample(guidance, F) * (F - F_uncond)
    elif torch.promote_types(F.dtype, dtype) != dtype:
        F = F.to(dtype)
    if noise is not None:
        noise = noise.to(dtype)
    return weighted_sum(coefficients, (x, F, noise), dtype).to(x.dtype)
