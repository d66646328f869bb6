"""Products and what follows them, summed in float32 and rounded once, at the outputs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulation_dtype
from ..segments import Segments, per_token


def linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate)·value (arXiv 2002.05202, equation 5) of x (…, K), (…, H), and `both` (…, 2H), the
    gates and values that it is made of, which stand in turn, as the rows of weight (2H, K) and the
    numbers of bias (2H,) do."""
    dtype = accumulation_dtype(x)
    both = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    gate, value = both[..., ::2], both[..., 1::2]
    return (F.silu(gate) * value).to(x.dtype), both.to(x.dtype)


def linear_swiglu_backward(dy: Tensor, weight: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient dy (…, N) of what a layer of weight (N, H) makes of SwiGLU's output, that
    of `both` (…, 2H), and its sums over tokens (2H,), float32, of what is not rounded yet."""
    dtype = accumulation_dtype(dy)
    dh = dy.to(dtype) @ weight.to(dtype)
    gate, value = both[..., ::2].to(dtype), both[..., 1::2].to(dtype)
    sigmoid = torch.sigmoid(gate)
    dgate = dh * value * sigmoid * (1 + gate * (1 - sigmoid))
    dboth = torch.stack((dgate, dh * gate * sigmoid), dim=-1).flatten(-2)
    return dboth.to(dy.dtype), dboth.flatten(0, -2).sum(0)


def linear_gated_residual(
    x: Tensor,
    weight: Tensor,
    row: Tensor,
    residual: Tensor,
    gate: Tensor,
    segments: Segments | None = None,
) -> Tensor:
    """residual + gate·(x·weightᵀ + row), (…, N), of x (…, K) and a row and a gate (S, N) or (1, N)
    a sample."""
    dtype = accumulation_dtype(x)
    branch = F.linear(x.to(dtype), weight.to(dtype)) + per_token(row.to(dtype), x, segments)
    gate = per_token(gate.to(dtype), x, segments)
    return torch.addcmul(residual.to(dtype), gate, branch).to(residual.dtype)
