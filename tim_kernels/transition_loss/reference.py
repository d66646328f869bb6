import torch
from torch import Tensor

from ..checks import accumulation_dtype
from ..coefficients import per_sample, weighted_sum

EPS = 1e-8  # the least norm in the cosine, as in torch.nn.functional.cosine_similarity


def transition_loss(
    prediction: Tensor,
    x: Tensor,
    z: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    dF: Tensor | None = None,
    epsilon: float | None = None,
    F_cond: Tensor | None = None,
    F_uncond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean square of prediction − target, mean over positions of 1 − cos(prediction, target)."""
    dtype = accumulation_dtype(prediction, x, z)
    a_x, a_z, a_D, a_cond, a_uncond = coefficients
    prediction = prediction.to(dtype)
    target = weighted_sum((a_x, a_z), (x, z), dtype)
    if dF is not None:
        dF = dF.to(dtype)
        if epsilon is not None:
            later, earlier = dF.chunk(2)
            dF = (later - earlier) / (2 * epsilon)
        first = x.shape[0] - dF.shape[0]
        rest = target[first:] + per_sample(a_D[first:].to(dtype), dF) * dF
        target = torch.cat((target[:first], rest))
    if F_cond is not None:
        F_cond, F_uncond = F_cond.to(dtype), F_uncond.to(dtype)
        target = target + weighted_sum((a_cond, a_uncond), (F_cond, F_uncond), dtype)
    target = target.detach()

    squared = (prediction - target).square().flatten(1).mean(1)
    cosine = (_unit(prediction) * _unit(target)).sum(1, keepdim=True)
    return squared, (1 - cosine).flatten(1).mean(1)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(EPS)
