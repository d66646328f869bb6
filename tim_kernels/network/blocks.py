"""TiM's blocks as functions of modules with the published names.

The gated residual of a sub-layer waits ("pending") and is taken up by the next norm, across
blocks too. A block is called with `rows`, its conditioning, where all blocks' was formed at once
(see `conditioning`); without, it forms its own from c and delta and packs nothing.
"""

from typing import NamedTuple

from torch import Tensor, nn

from ..ada_layer_norm.op import ada_layer_norm, gated_residual_ada_layer_norm
from ..attention.op import attention
from ..qk_norm_rope.op import qk_norm_rope, qkv_norm_rope
from .conditioning import BlockConditioning, condition_block
from .layers import swiglu_mlp


class Rope(NamedTuple):
    """Where the tokens of a grid sit: see `qk_norm_rope`."""

    grid: tuple[int, int]
    order: str


class Pending(NamedTuple):
    """A sub-layer's output (B, N, C) that is not yet added, its gate and its bias (B, C)."""

    branch: Tensor
    gate: Tensor
    bias: Tensor | None = None


class TextKeys(NamedTuple):
    """The text as one block's cross-attention reads it, (B, L, heads, head_dim) both."""

    k: Tensor
    v: Tensor


def class_block(
    block: nn.Module,
    x: Tensor,
    pending: Pending | None,
    c: Tensor,
    delta: Tensor,
    text: None,  # every block is called alike
    rope: Rope,
    rows: BlockConditioning | None = None,
) -> tuple[Tensor, Pending]:
    """Self-attention and MLP of tokens x (B, N, C); the MLP's output stays pending."""
    packed = rows is not None
    rows = rows or condition_block(block, c, delta)
    shift1, scale1, gate1, shift2, scale2, gate2 = rows.modulation.chunk(6, dim=-1)
    x, h = add_and_norm(x, pending, shift1, scale1, block.norm1.eps)
    pending = Pending(self_attention(block.attn, h, rows, rope), gate1, rows.value_bias)
    x, h = add_and_norm(x, pending, shift2, scale2, block.norm2.eps)
    return x, Pending(swiglu_mlp(block.mlp, h, packed), gate2)


def text_block(
    block: nn.Module,
    x: Tensor,
    pending: Pending | None,
    c: Tensor,
    delta: Tensor,
    text: Tensor | TextKeys,
    rope: Rope,
    rows: BlockConditioning | None = None,
) -> tuple[Tensor, Pending]:
    """Self-attention, cross-attention to text (B, L, C) and MLP; the MLP's output stays pending."""
    packed = rows is not None
    rows = rows or condition_block(block, c, delta)
    m = rows.modulation.chunk(9, dim=-1)
    x, h = add_and_norm(x, pending, m[0], m[1], block.norm1.eps)
    pending = Pending(self_attention(block.attn, h, rows, rope), m[2], rows.value_bias)
    x, h = add_and_norm(x, pending, m[3], m[4], block.norm2_i.eps)
    keys = text if isinstance(text, TextKeys) else text_keys(block, text)
    pending = Pending(cross_attention(block.cross_attn, h, keys, rope), m[5])
    x, h = add_and_norm(x, pending, m[6], m[7], block.norm3.eps)
    return x, Pending(swiglu_mlp(block.mlp, h, packed), m[8])


def text_keys(block: nn.Module, text: Tensor) -> TextKeys:
    """Keys and values of text (B, L, C) for one block; they depend on nothing else."""
    attn = block.cross_attn
    heads = _heads(attn, text.shape[-1])
    k, v = attn.kv(block.norm2_t(text)).unflatten(-1, (2, heads, -1)).unbind(2)
    if _affine(attn.k_norm)[0] is not None:
        k = qk_norm_rope(k, None, *_affine(attn.k_norm), eps=_eps(attn.k_norm))  # no positions
    return TextKeys(k, v)


def add_and_norm(x, pending: Pending | None, shift, scale, eps) -> tuple[Tensor, Tensor]:
    """Take up what is pending: x' and its modulated norm, in one read."""
    if pending is None:
        return x, ada_layer_norm(x, shift, scale, eps)
    branch, gate, bias = pending
    return gated_residual_ada_layer_norm(x, branch, gate, shift, scale, eps, branch_bias=bias)


def self_attention(attn: nn.Module, h: Tensor, rows: BlockConditioning, rope: Rope) -> Tensor:
    qkv = attn.qkv(h).unflatten(-1, (3, _heads(attn, h.shape[-1]), -1))
    q, k, v = qkv_norm_rope(
        qkv, *_affine(attn.q_norm), *_affine(attn.k_norm),
        grid=rope.grid, order=rope.order, q_shift=rows.q_shift, k_shift=rows.k_shift,
        eps=_eps(attn.q_norm),
    )  # fmt: skip
    if rows.v_shift is not None:
        v = v + rows.v_shift.view(-1, 1, *v.shape[2:])
    return attn.proj(attention(q, k, v).flatten(2))


def cross_attention(attn: nn.Module, h: Tensor, text: TextKeys, rope: Rope) -> Tensor:
    q = attn.q(h).unflatten(-1, (_heads(attn, h.shape[-1]), -1))
    norm = attn.q_norm
    q = qk_norm_rope(q, None, *_affine(norm), grid=rope.grid, order=rope.order, eps=_eps(norm))
    return attn.proj(attention(q, text.k, text.v).flatten(2))


def _heads(attn: nn.Module, width: int) -> int:
    weight = _affine(attn.q_norm)[0]
    return attn.num_heads if weight is None else width // weight.shape[0]


def _affine(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return getattr(norm, "weight", None), getattr(norm, "bias", None)


def _eps(norm: nn.Module) -> float:
    return getattr(norm, "eps", 1e-5)
