"""Other projects' kernels, each on a call in which they do the very same work as an op of ours.

They are measured where they are installed. Nothing of theirs is needed.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

import tim_kernels as ops
from tests.eager import apply_rope

from .calls import Call, maker
from .eager import Tokens, swiglu
from .shapes import Shape

ONE_ROW = "ada_layer_norm of one row, weight and bias"
TWO_TENSORS = "swiglu of two tensors"
ROTATION = "qk_norm_rope, rotation alone"
ATTENTION = "attention"  # its tangent is timed in compare/derivative.py


class Peer(NamedTuple):
    """`load()` is its kernel as a function of the call's tensors and constants."""

    name: str
    package: str
    call: str
    load: Callable[[], Callable]

    def kernel(self) -> Callable | str:
        """What `load` gives, or why there is nothing."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        try:
            return self.load()
        except Exception as error:  # another version than the one the loader was written for
            return f"{self.package} is there but does not fit: {error!r}"


def _liger_layer_norm():
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-6)


def _liger_swiglu():
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def _quack_layer_norm():
    from quack.rmsnorm import layernorm_fwd

    def forward(x, weight, bias):
        if any(tensor.requires_grad for tensor in (x, weight, bias)):
            raise NotImplementedError("quack's layernorm has no backward of its own")
        return layernorm_fwd(x.flatten(0, -2), weight, bias, eps=1e-6).view(x.shape)

    return forward


def _flash_rotary():
    from flash_attn.layers.rotary import apply_rotary_emb

    def rotate(q, k, cos, sin):
        cos, sin = (table[:, 0, ::2].contiguous() for table in (cos, sin))  # (N, head_dim/2)
        return tuple(apply_rotary_emb(x, cos, sin, interleaved=True) for x in (q, k))

    return rotate


def _jvp_flash_attention():
    from jvp_flash_attention.jvp_attention import JVPAttn

    def attention(q, k, v):
        return JVPAttn.fwd_dual(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return attention


PEERS = (
    Peer("liger", "liger_kernel", ONE_ROW, _liger_layer_norm),
    Peer("quack", "quack", ONE_ROW, _quack_layer_norm),
    Peer("liger", "liger_kernel", TWO_TENSORS, _liger_swiglu),
    Peer("flash-attn rotary", "flash_attn", ROTATION, _flash_rotary),
    Peer("jvp_flash_attention", "jvp_flash_attention", ATTENTION, _jvp_flash_attention),
)


def calls(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Call]:
    """The calls that peers share with us, of unpacked tokens."""
    batch, N, C = shape.batch, math.prod(shape.grid), shape.width
    make = maker(dtype, device)
    weight, bias = 1 + 0.3 * make(C, dtype=torch.float32), make(C, dtype=torch.float32)
    yield Call(
        ONE_ROW,
        lambda x, weight, bias: ops.ada_layer_norm(x, bias[None], weight[None] - 1),
        (make(batch, N, C), weight, bias),
        lambda x, weight, bias: F.layer_norm(
            x, (C,), weight.to(x.dtype), bias.to(x.dtype), eps=1e-6
        ),
    )
    hidden = C * 8 // 3
    yield Call(TWO_TENSORS, ops.swiglu, (make(batch, N, hidden), make(batch, N, hidden)), swiglu)
    heads = C // shape.head_dim
    q, k, _ = make(batch, N, 3 * C).unflatten(-1, (3, heads, shape.head_dim)).unbind(2)
    plain = Tokens(shape.grid, None, shape.head_dim, device)
    yield Call(
        ROTATION,
        lambda q, k, cos, sin: ops.qk_norm_rope(q, k, grid=shape.grid),
        (q, k),
        lambda q, k, cos, sin: (apply_rope(q, cos, sin), apply_rope(k, cos, sin)),
        (plain.cos, plain.sin),
    )
