from torch import Tensor

from ..checks import accumulation_dtype
from ..coefficients import cast, per_sample, weighted_sum


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
    state, F, F_uncond, guidance, noise = cast((x, F_cond, F_uncond, guidance, noise), dtype)
    if F_uncond is not None:
        F = F_uncond + per_sample(guidance, F) * (F - F_uncond)
    return weighted_sum(cast(coefficients, dtype), (state, F, noise)).to(x.dtype)
