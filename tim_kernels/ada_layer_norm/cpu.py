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
    below float64, without forward mode; conditioning in rows, and the plain norm."""
    if x.ndim != 3 or not x.shape[0] or x[0].numel() < LEAST:
        return False
    is_plain = norm is None or (norm == "layer" and weight is None and norm_bias is None)
    rows = (() if branch is None else (gate,)) + (() if norm is None else (shift, scale))
    if not is_plain or any(row is None or row.ndim != 2 for row in rows):
        return False
    same = all(y is None or y.dtype == x.dtype for y in (branch, gate, bias))
    return same and x.dtype != torch.float64 and not is_forward_mode()


def run(x, branch, gate, bias, shift, scale, eps) -> tuple[Tensor | None, Tensor | None]:
    """(x', y), None where there is no branch or no scale; arguments as the operator's."""
    new = None
    if branch is not None:
        branch = branch if bias is None else branch + bias.unsqueeze(1)
        x = new = x + gate.unsqueeze(1) * branch
    return new, None if scale is None else _norm(x, shift, scale, eps)


def _norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    is_differentiated = torch.is_grad_enabled() and (shift.requires_grad or scale.requires_grad)
    if is_differentiated and x.dtype != torch.float32:
        # the sums over tokens that are a weight's gradient have x's dtype there: 1 % off
        y = F.layer_norm(x, x.shape[-1:], eps=eps)
        return torch.addcmul(shift.unsqueeze(1), y, 1 + scale.unsqueeze(1)).to(x.dtype)
    shift, scale = shift.float(), 1 + scale.float()
    if shift.shape[0] == scale.shape[0] == 1:
        return F.layer_norm(x, x.shape[-1:], scale[0], shift[0], eps)
    rows = (row.expand(x.shape[0], -1).unbind(0) for row in (scale, shift))
    samples = zip(x.unbind(0), *rows, strict=True)
    return torch.stack([F.layer_norm(one, x.shape[-1:], *row, eps) for one, *row in samples])
