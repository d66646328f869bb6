"""TiM's blocks and their parts, as functions of modules with the published names.

The gated residual of a sub-layer waits ("pending") and is taken up by the next norm, across blocks
too. What modulates a block is formed by it from c and delta, or given as `rows` by whoever formed
it before. Norms are fused with their neighbours where they are plain, and called where not.

Tokens are (B, N, C), or packed (T, C), of pictures that `Rope` describes; everything else is of
B pictures in both.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..ada_layer_norm.fp8 import ada_layer_norm_fp8, gated_residual_ada_layer_norm_fp8
from ..ada_layer_norm.op import ada_layer_norm, gated_residual, gated_residual_ada_layer_norm
from ..segments import Segments, per_token
from .attentions import (
    NormedText,
    Pending,
    Rope,
    Shifts,
    TextKeys,
    attention_branch,
    cross_branch,
    keys_and_values,
    shifts_of,
)
from .fp8_linear import Fp8Tokens
from .layers import (
    add_product,
    ends_in_residual,
    is_plain,
    is_quiet,
    swiglu_branch,
    swiglu_hidden,
    swiglu_mlp,
    takes_fp8,
)


class BlockRows(NamedTuple):
    """What a block knows of time and class, one row a sample."""

    modulation: Tensor  # (B, 6C) or (B, 9C): shift, scale, gate of each sub-layer
    shifts: Shifts


def condition_block(block: nn.Module, c: Tensor, delta: Tensor, paths: bool) -> BlockRows:
    """One block's rows from c and delta (B, C); `paths` as in `Rope`."""
    return BlockRows(block.adaLN_modulation(c), shifts_of(block.attn, delta, paths))


def class_block(
    block: nn.Module,
    x: Tensor,
    pending: Pending | None,
    c: Tensor | None,
    delta: Tensor | None,
    text: None,  # every block is called alike
    rope: Rope,
    rows: BlockRows | None = None,
) -> tuple[Tensor, Pending] | Tensor:
    """Self-attention and MLP of tokens x (B, N, C); the MLP's output stays pending."""
    modulation, shifts = rows or condition_block(block, c, delta, rope.paths)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
    is_fp8 = takes_fp8(block.attn, "qkv")
    x, h = add_and_norm(block.norm1, x, pending, shift1, scale1, rope.segments, is_fp8)
    x, pending = attention_branch(block.attn, x, h, shifts, rope, gate1)
    is_fp8 = takes_fp8(block.mlp, "fc1_g", "fc1_x")
    x, h = add_and_norm(block.norm2, x, pending, shift2, scale2, rope.segments, is_fp8)
    return leave(block, *_mlp_branch(block.mlp, x, h, rope, gate2), rope.segments)


def text_block(
    block: nn.Module,
    x: Tensor,
    pending: Pending | None,
    c: Tensor | None,
    delta: Tensor | None,
    text: Tensor | NormedText | TextKeys,
    rope: Rope,
    rows: BlockRows | None = None,
) -> tuple[Tensor, Pending] | Tensor:
    """Self-attention, cross-attention to text (B, L, C) and MLP; the MLP's output stays pending."""
    modulation, shifts = rows or condition_block(block, c, delta, rope.paths)
    m = modulation.chunk(9, dim=-1)
    is_fp8 = takes_fp8(block.attn, "qkv")
    x, h = add_and_norm(block.norm1, x, pending, m[0], m[1], rope.segments, is_fp8)
    x, pending = attention_branch(block.attn, x, h, shifts, rope, m[2])
    is_fp8 = takes_fp8(block.cross_attn, "q")
    x, h = add_and_norm(block.norm2_i, x, pending, m[3], m[4], rope.segments, is_fp8)
    text = block.norm2_t(text) if isinstance(text, Tensor) else text
    x, pending = cross_branch(block.cross_attn, x, h, text, rope, m[5])
    is_fp8 = takes_fp8(block.mlp, "fc1_g", "fc1_x")
    x, h = add_and_norm(block.norm3, x, pending, m[6], m[7], rope.segments, is_fp8)
    return leave(block, *_mlp_branch(block.mlp, x, h, rope, m[8]), rope.segments)


def _mlp_branch(
    mlp: nn.Module, x: Tensor, h: Tensor | Fp8Tokens, rope: Rope, gate: Tensor
) -> tuple[Tensor, Pending | None]:
    """x and what mlp(h) is to add to it; nothing where its last product does."""
    if not rope.gradients and ends_in_residual(mlp, swiglu_mlp, mlp.fc2, x, rope.segments):
        return add_product(mlp.fc2, swiglu_hidden(mlp, h), x, gate, None, rope.segments), None
    branch, path = swiglu_branch(mlp, h, rope.paths)
    return x, Pending(branch, gate, path)


def leave(
    block: nn.Module, x: Tensor, pending: Pending | None, segments: Segments | None
) -> tuple[Tensor, Pending] | Tensor:
    """What a block gives to the next, or, where somebody looks on, its whole output."""
    return (x, pending) if is_quiet(block) else take_up(x, pending, segments)


def take_up(x: Tensor, pending: Pending | None, segments: Segments | None) -> Tensor:
    """x with what is pending added."""
    if pending is None:
        return x
    return gated_residual(x, pending.branch, pending.gate, pending.bias, segments)


def add_and_norm(
    norm: nn.Module,
    x: Tensor,
    pending: Pending | None,
    shift: Tensor,
    scale: Tensor,
    segments: Segments | None,
    to_fp8: bool = False,
) -> tuple[Tensor, Tensor | Fp8Tokens]:
    """x with what is pending added, and its modulated norm: one read, where the norm is plain;
    there the norm is made as FP8 if its reader takes that."""
    if not is_plain(norm, nn.LayerNorm) or norm.normalized_shape != x.shape[-1:]:
        x = take_up(x, pending, segments)
        shift, scale = (per_token(row, x, segments) for row in (shift, scale))
        return x, norm(x) * (1 + scale) + shift
    affine = {} if norm.weight is None else dict(weight=norm.weight, bias=norm.bias)
    if pending is None:
        if to_fp8:
            h = ada_layer_norm_fp8(x, shift, scale, norm.eps, segments, **affine)
            return x, Fp8Tokens(*h, x.dtype)
        return x, ada_layer_norm(x, shift, scale, norm.eps, segments, **affine)
    branch, gate, bias = pending
    if to_fp8:
        x, *h = gated_residual_ada_layer_norm_fp8(
            x, branch, gate, shift, scale, norm.eps, bias, segments, **affine
        )
        return x, Fp8Tokens(*h, x.dtype)
    return gated_residual_ada_layer_norm(
        x, branch, gate, shift, scale, norm.eps, bias, segments, **affine
    )


def _is_bare(norm: nn.Module) -> bool:
    return is_plain(norm, nn.LayerNorm) and norm.weight is None


def norm_text(blocks: Sequence[nn.Module], text: Tensor) -> Tensor | NormedText:
    """The text normed once, if it is the same norm in all blocks; else as it is."""
    norms = [block.norm2_t for block in blocks]
    if all(_is_bare(norm) and norm.eps == norms[0].eps for norm in norms):
        return NormedText(norms[0](text))
    return text


def final_layer(
    layer: nn.Module,
    x: Tensor,
    c: Tensor,
    pending: Pending | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Tokens (B, N, C), modulated by c (B, C) or (B, 1, C), or `rows` made of it, → (B, N, out)."""
    shift, scale = rows or final_rows(layer, c)
    return layer.linear(add_and_norm(layer.norm_final, x, pending, shift, scale, segments)[1])


def final_rows(layer: nn.Module, c: Tensor) -> tuple[Tensor, Tensor]:
    """shift and scale of the last norm, (B, C) both."""
    return layer.adaLN_modulation(c.flatten(1)).chunk(2, dim=-1)


def text_keys(block: nn.Module, text: Tensor) -> TextKeys:
    """Keys and values of text (B, L, C) for one block; they depend on nothing else."""
    return keys_and_values(block.cross_attn, block.norm2_t(text))
