from torch import Tensor

from ..coefficients import per_sample, weighted_sum
from ..dtypes import accumulation_dtype


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
    F = F_cond.to(dtype)
    if F_uncond is not None:
        F_uncond = F_uncond.to(dtype)
        F = F_uncond + per_sample(guidance.to(dtype), x) * (F - F_uncond)
    return weighted_sum(coefficients, (x, F, noise), dtype).to(x.dtype)
