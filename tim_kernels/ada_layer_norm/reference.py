import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulation_dtype
from ..fp8 import quantise_rows
from ..segments import Segments, per_token
from .forms import is_of_token


def ada_layer_norm(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    segments: Segments | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
) -> Tensor:
    """(norm(x)·weight + bias)·(1 + scale) + shift."""
    dtype = accumulation_dtype(x, shift, scale, weight, bias)
    shift, scale = (_over_tokens(cond, x, segments, dtype) for cond in (shift, scale))
    y = x.to(dtype)
    if norm == "rms":
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    else:
        y = F.layer_norm(y, y.shape[-1:], eps=eps)
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    if shift is not None and scale is not None:
        y = torch.addcmul(shift, y, 1 + scale)
    elif scale is not None:
        y = y * (1 + scale)
    elif shift is not None:
        y = y + shift
    return y.to(x.dtype)


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    branch_bias: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """x + gate·(branch + branch_bias)."""
    return _gated_residual(x, branch, gate, branch_bias, segments).to(x.dtype)


def gated_residual_ada_layer_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    branch_bias: Tensor | None = None,
    segments: Segments | None = None,
    **affine,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate·(branch + branch_bias) and (norm(x')·weight + bias)·(1 + scale) + shift."""
    new = _gated_residual(x, branch, gate, branch_bias, segments)
    y = ada_layer_norm(new, shift, scale, eps, segments, **affine)
    return new.to(x.dtype), y.to(x.dtype)


def ada_layer_norm_fp8(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    branch_bias: Tensor | None,
    segments: Segments | None,
    **affine,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """x', None without a branch, and the unrounded y as FP8 values and scales."""
    if branch is None:
        new = x.to(accumulation_dtype(x))
    else:
        new = _gated_residual(x, branch, gate, branch_bias, segments)
    y = ada_layer_norm(new, shift, scale, eps, segments, **affine)
    return None if branch is None else new.to(x.dtype), *quantise_rows(y)


def _gated_residual(x, branch, gate, branch_bias, segments) -> Tensor:
    dtype = accumulation_dtype(x, branch, gate)
    branch = branch.to(dtype)
    if branch_bias is not None:
        branch = branch + per_token(branch_bias.to(dtype), x, segments)
    if gate is None:
        return x.to(dtype) + branch
    return torch.addcmul(x.to(dtype), _over_tokens(gate, x, segments, dtype), branch)


def _over_tokens(cond: Tensor | None, x, segments, dtype) -> Tensor | None:
    """Conditioning in a dtype, shaped to broadcast over tokens."""
    if cond is None:
        return None
    cond = cond.to(dtype)
    if is_of_token(cond):
        return cond if segments is None else cond.squeeze(0)
    return per_token(cond, x, segments)
