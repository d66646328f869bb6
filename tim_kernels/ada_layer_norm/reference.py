import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulation_dtype
from ..segments import Segments, per_token


def ada_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, segments: Segments | None = None
) -> Tensor:
    """LN(x)·(1 + scale) + shift."""
    dtype = accumulation_dtype(x, shift, scale)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    shift, scale = (per_token(row.to(dtype), x, segments) for row in (shift, scale))
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    branch_bias: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """x + gate·(branch + branch_bias)."""
    return _gated_residual(x, branch, gate, branch_bias, segments).to(x.dtype)


def gated_residual_ada_layer_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    branch_bias: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate·(branch + branch_bias) and LN(x')·(1 + scale) + shift."""
    new = _gated_residual(x, branch, gate, branch_bias, segments)
    y = ada_layer_norm(new, shift, scale, eps, segments)
    return new.to(x.dtype), y.to(x.dtype)


def _gated_residual(x, branch, gate, branch_bias, segments) -> Tensor:
    dtype = accumulation_dtype(x, branch, gate)
    branch = branch.to(dtype)
    if branch_bias is not None:
        branch = branch + per_token(branch_bias.to(dtype), x, segments)
    return torch.addcmul(x.to(dtype), per_token(gate.to(dtype), x, segments), branch)
