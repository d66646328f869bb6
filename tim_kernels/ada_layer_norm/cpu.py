"""adaLN on a CPU, in as few passes as PyTorch's own kernels allow.

A sample's LayerNorm and modulation are one LayerNorm whose weight and bias are the conditioning
rows, in float32 beside tokens of any dtype. The gated residual of bfloat16 and float16 rounds as
eager PyTorch does: gate·branch, x', which the norm reads, and y.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.torch_private import is_forward_mode

LEAST = 1 << 14  # elements of a sample for which a call of its own pays


def takes(x, branch, gate, bias, shift, scale, weight, norm_bias, eps, norm) -> bool:
    """Whether `run` computes these tokens: of samples that are not tiny, all tensors of one dtype
    below float64, without forward mode."""
    if x.ndim != 3 or not x.shape[0] or x[0].numel() < LEAST or is_forward_mode():
        return False
    others = branch, gate, bias, shift, scale, weight, norm_bias
    same = all(y is None or y.dtype == x.dtype for y in others)
    return same and x.dtype != torch.float64


def run(
    x, branch, gate, bias, shift, scale, weight, norm_bias, eps, norm
) -> tuple[Tensor | None, Tensor | None]:
    """(x', y), None where there is no branch or no norm; arguments as the operator's."""
    new = None
    if branch is not None:
        branch = branch if bias is None else branch + _wide(bias)
        x = new = _add(x, branch, gate)
    if norm is None:
        return new, None
    is_of_rows = norm == "layer" and all(row is None or row.ndim == 2 for row in (shift, scale))
    if is_of_rows and (x.dtype == torch.float32 or not _is_differentiated(x, shift, scale, weight)):
        return new, _norm_by_rows(x, shift, scale, weight, norm_bias, eps)
    if norm == "rms":  # with one factor for weight and scale
        y, scale = F.rms_norm(x, x.shape[-1:], eps=eps), None if scale is None else 1 + _wide(scale)
        if norm_bias is not None:
            moved = norm_bias if scale is None else norm_bias * scale
            shift = moved if shift is None else _wide(shift) + moved
        if weight is not None:
            scale = weight if scale is None else weight * scale
    else:
        y = F.layer_norm(x, x.shape[-1:], weight, norm_bias, eps)
        scale = None if scale is None else 1 + _wide(scale)
    y = y if scale is None else _add(shift, y, scale)
    y = y if scale is not None or shift is None else y + _wide(shift)
    return new, y.to(x.dtype)


def _wide(cond: Tensor) -> Tensor:
    """Of each token as it is, a row a sample (B, 1, C)."""
    return cond.unsqueeze(1) if cond.ndim == 2 else cond


def _is_differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _add(x: Tensor | None, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate·y, without what is None."""
    if x is None or gate is None:
        return y * _wide(gate) if x is None else x + y
    if _is_differentiated(x, y, gate):  # the backward of addcmul has one pass more
        return _wide(x) + _wide(gate) * y
    return torch.addcmul(_wide(x), _wide(gate), y)


def _norm_by_rows(x, shift, scale, weight, norm_bias, eps: float) -> Tensor:
    """Each sample's own weight and bias of a LayerNorm. (Below float32 only without gradients:
    the sums over tokens that are a weight's would have x's dtype, 1 % off.)"""
    scale = None if scale is None else 1 + scale.float()
    shift = None if shift is None else shift.float()
    if norm_bias is not None:
        norm_bias = norm_bias.float() if scale is None else norm_bias * scale
        shift = norm_bias if shift is None else shift + norm_bias
    if weight is not None:
        scale = weight.float() if scale is None else weight * scale
    if all(row is None or row.ndim == 1 or row.shape[0] == 1 for row in (scale, shift)):
        row = [None if row is None else row.view(-1) for row in (scale, shift)]
        return F.layer_norm(x, x.shape[-1:], *row, eps)
    rows = [
        (None,) * x.shape[0] if row is None else row.expand(x.shape[0], -1).unbind(0)
        for row in (scale, shift)
    ]
    samples = zip(x.unbind(0), *rows, strict=True)
    return torch.stack([F.layer_norm(one, x.shape[-1:], *row, eps) for one, *row in samples])
