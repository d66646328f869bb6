"""Linear layers that take up what follows them: operators, gradients, and functions for networks.

What is asked of them, and when they are worth it, is choice.py's and `is_worth`'s to say; callers
go by PyTorch's products elsewhere. They have no tangents. On a CPU they are the reference.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch.operators import Operator, refuse_derivatives
from ..segments import Segments, packing, unpacked
from . import reference
from .choice import launchers, product_dtype

TILE = 128  # tokens
SHARE = 16  # of the tokens, by which tiles may be longer


class Name(NamedTuple):
    """Of operators whose kernels are no backend of ours."""

    name: str


class LibraryOperator(Operator):
    """An operator that a library runs on a GPU, and the reference on a CPU."""

    def __init__(self, schema: str, fake: Callable, on_cpu: Callable):
        super().__init__(Name(""), schema, fake)
        self.own = on_cpu

    def _launcher(self, args: tuple, device: str) -> Callable:
        return getattr(launchers(), self.name) if device == "cuda" else self.own


def _swiglu_fake(x, weight, bias, keep):
    hidden = weight.shape[0] // 2
    return x.new_empty(x.shape[0], hidden), x.new_empty((x.shape[0], 2 * hidden) if keep else 0)


def _swiglu(x, weight, bias, keep):
    out, both = reference.linear_swiglu(x, weight, bias)
    return out, both if keep else x.new_empty(0)


def _residual(x, weight, row, residual, gate, cu, max_length):
    segments = unpacked(cu, max_length, x)
    return reference.linear_gated_residual(x, weight, row, residual, gate, segments)


swiglu_op = LibraryOperator(
    "linear_swiglu(Tensor x, Tensor weight, Tensor bias, bool keep) -> (Tensor, Tensor)",
    _swiglu_fake, _swiglu,
)  # fmt: skip
swiglu_backward_op = LibraryOperator(
    "linear_swiglu_backward(Tensor dy, Tensor weight, Tensor both) -> (Tensor, Tensor)",
    lambda dy, weight, both: (
        torch.empty_like(both), both.new_empty(both.shape[1], dtype=torch.float32),
    ),
    reference.linear_swiglu_backward,
)  # fmt: skip
residual_op = LibraryOperator(
    "linear_gated_residual(Tensor x, Tensor weight, Tensor row, Tensor residual, Tensor gate, "
    "Tensor? cu_seqlens, SymInt max_length) -> Tensor",
    lambda x, weight, row, residual, *_: torch.empty_like(residual),
    _residual,
)  # fmt: skip


def is_worth(x: Tensor) -> bool:
    """Whether SwiGLU in the product of tokens x (…, K) saves more than the interleaved weight
    costs: with H gates that is 8·H·K bytes a product, what is not moved 8·H a token in inference
    and in training, which makes it twice, as well. So there have to be K tokens, in training 2K,
    for it to be as much."""
    return x.numel() >= 4 * x.shape[-1] ** 2


def are_tiles_full(x: Tensor, segments: Segments | None) -> bool:
    """Whether the tiles of a product that begins anew with each sample hold few tokens of none."""
    if segments is None:
        lengths: Sequence[int] = (x.shape[1],)
    elif segments.lengths is None:
        return False
    else:
        lengths = segments.lengths
    padding = sum(-length % TILE for length in lengths)
    return padding * SHARE <= sum(lengths)


class Layer(NamedTuple):
    """The weight (N, K) of a linear layer, and its bias (N,), if it has one."""

    weight: Tensor
    bias: Tensor | None


def linear_swiglu(x: Tensor, gate: Layer, value: Layer) -> Tensor:
    """silu(gate(x))·value(x) of tokens x (…, K), (…, H), without gate(x) and value(x).

    Raises:
        NotImplementedError: an argument needs a gradient or has a tangent.
    """
    refuse_derivatives("linear_swiglu", (x, *gate, *value))
    tokens = _tokens(x)
    out, _ = swiglu_op(tokens, *_interleaved(gate, value, tokens), False)
    return out.view(*x.shape[:-1], -1)


def mlp(x: Tensor, gate: Layer, value: Layer, last: Layer) -> Tensor:
    """last(silu(gate(x))·value(x)) of tokens x (…, K), once differentiable. Gradients of weights
    and biases are sums over tokens in their own order, the same at every run."""
    tokens = _tokens(x)
    return _Mlp.apply(tokens, *gate, *value, *last).view(*x.shape[:-1], -1)


def linear_gated_residual(
    x: Tensor,
    layer: Layer,
    residual: Tensor,
    gate: Tensor,
    bias: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """residual + gate·(layer(x) + bias) of tokens x (B, N, K) or packed (T, K), without layer(x);
    gate and bias are (B, C) or (1, C).

    Raises:
        NotImplementedError: an argument needs a gradient or has a tangent.
    """
    refuse_derivatives("linear_gated_residual", (x, *layer, residual, gate, bias))
    dtype, (weight, own) = product_dtype(x), layer
    row = gate.new_zeros(1, weight.shape[0], dtype=torch.float32) if own is None else own[None]
    row = row.float() if bias is None else row.float() + bias
    return residual_op(
        x.to(dtype), weight.to(dtype), row, residual, gate, *packing(segments, "x", x)
    )


def _tokens(x: Tensor) -> Tensor:
    return x.to(product_dtype(x)).flatten(0, -2)


def _interleaved(gate: Layer, value: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (2H, K) in the dtype of x and bias (2H,) in float32, gates and values in turn."""
    H, K = gate.weight.shape
    weight = x.new_empty(H, 2, K)
    bias = x.new_zeros(H, 2, dtype=torch.float32)
    for i, layer in enumerate((gate, value)):
        weight[:, i].copy_(layer.weight)
        if layer.bias is not None:
            bias[:, i].copy_(layer.bias)
    return weight.flatten(0, 1), bias.flatten()


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_weight, gate_bias, value_weight, value_bias, weight, bias):
        layers = Layer(gate_weight, gate_bias), Layer(value_weight, value_bias)
        h, both = swiglu_op(x, *_interleaved(*layers, x), True)
        ctx.save_for_backward(x, gate_weight, value_weight, weight, h, both)
        ctx.dtypes = [None if y is None else y.dtype for y in (gate_bias, value_bias, bias)]
        return F.linear(h, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate, value, weight, h, both = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = dgate = dvalue = dweight = None
        dboth, sums = swiglu_backward_op(dy.contiguous(), weight.to(dy.dtype), both)
        if needs[0]:
            layers = Layer(gate, None), Layer(value, None)
            dx = dboth @ _interleaved(*layers, x)[0]
        if needs[1] or needs[3]:
            dgate, dvalue = (dboth.t() @ x).unflatten(0, (-1, 2)).unbind(1)
            dgate, dvalue = dgate.to(gate.dtype), dvalue.to(value.dtype)
        if needs[5]:
            dweight = (dy.t() @ h).to(weight.dtype)
        sums = *sums.unflatten(0, (-1, 2)).unbind(1), dy.sum(0) if needs[6] else None
        dbiases = [
            total.to(dtype) if need else None
            for total, dtype, need in zip(sums, ctx.dtypes, needs[2::2], strict=True)
        ]
        return dx, dgate, dbiases[0], dvalue, dbiases[1], dweight, dbiases[2]
