"""TiM on the fused ops, as functions over a tree of modules with the published names.

The functions read weights and call plain layers; which class the modules are does not matter.
`tim.models` runs on them, and `accelerate` makes somebody else's model of the same tree do so.

What is fused beyond single ops: the gated residual of a sub-layer waits ("pending") and is taken
up by the next norm, across blocks too; the conditioning of all blocks is a few grouped GEMMs
before the first block; the per-sample bias of the values passes through attention as a constant,
since softmax rows sum to one; projections that read the same input are one GEMM. Conditioning
stays one row a sample.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ada_layer_norm.op import ada_layer_norm, gated_residual, gated_residual_ada_layer_norm
from ..attention.op import attention
from ..qk_norm_rope.op import qk_norm_rope, qkv_norm_rope
from ..swiglu.op import swiglu
from ..time_pair_embedding.op import TimeMLP, time_pair_embedding
from .forward_mode import lean
from .packing import pack


class Rope(NamedTuple):
    """Where the tokens of a grid sit: see `qk_norm_rope`."""

    grid: tuple[int, int]
    order: str


class BlockConditioning(NamedTuple):
    """What one block knows of time and class: a row a sample each, None without qkv_d."""

    modulation: Tensor  # (B, 6C) or (B, 9C): shift, scale, gate of each sub-layer
    q_shift: Tensor | None  # (B, C)
    k_shift: Tensor | None  # (B, C)
    value_bias: Tensor | None  # (B, C), the values' shift as the output projection sees it


class Pending(NamedTuple):
    """A sub-layer's output (B, N, C) that is not yet added, its gate and its bias (B, C)."""

    branch: Tensor
    gate: Tensor
    bias: Tensor | None = None


@lean
def tim(
    model: nn.Module,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    y: Tensor,
    *,
    new_condition: str,
    rope_order: str,
    features_depth: int | None = None,
    checkpoint: Callable | None = None,
) -> tuple[Tensor, Tensor | None]:
    """F(x, t, r, y) and, projected, the output of block `features_depth` (1-based).

    x is (B, channels, H, W), t and r are (B,) network times, y labels (B,) or text features
    (B, L, D). `checkpoint(function, *args)` runs each block if given. Nothing is checked here.
    """
    if any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__):
        raise NotImplementedError(
            "FSDP2 gives parameters new memory at every step, and blocks read each other's here: "
            "use DistributedDataParallel"
        )
    patch = model.x_embedder.proj.kernel_size[0]
    rope = Rope((x.shape[2] // patch, x.shape[3] // patch), rope_order)
    delta_embedder = getattr(model, "delta_embedder", None)
    c, delta = time_pair_embedding(
        t,
        r,
        _time_mlp(model.t_embedder),
        None if delta_embedder is None else _time_mlp(delta_embedder),
        new_condition,
    )
    c = c + delta
    text = None
    if hasattr(model.y_embedder, "embedding_table"):
        c = c + F.embedding(y, model.y_embedder.embedding_table.weight)
    else:
        norm = model.y_embedder.norm
        text = swiglu_mlp(model.y_embedder.mlp, norm(y.to(norm.weight.dtype)))
    conditioning = condition_blocks(model.blocks, c, delta)

    x = embed_patches(model.x_embedder.proj, x)
    pending, features = None, None
    for depth, (block, rows) in enumerate(zip(model.blocks, conditioning, strict=True), start=1):
        run = text_block if hasattr(block, "cross_attn") else class_block
        arguments = (block, x, pending, rows, text, rope)
        x, pending = checkpoint(run, *arguments) if checkpoint else run(*arguments)
        if depth == features_depth:
            x, pending = gated_residual(x, pending.branch, pending.gate, pending.bias), None
            features = model.projector(x)
    shift, scale = swiglu_mlp(model.final_layer.adaLN_modulation, c).chunk(2, dim=-1)
    _, out = add_and_norm(x, pending, shift, scale, model.final_layer.norm_final.eps)
    return unpatchify(model.final_layer.linear(out), rope.grid, patch), features


def class_block(block, x, pending, rows: BlockConditioning, text, rope) -> tuple[Tensor, Pending]:
    """Self-attention and MLP; the MLP's output stays pending."""
    shift1, scale1, gate1, shift2, scale2, gate2 = rows.modulation.chunk(6, dim=-1)
    x, h = add_and_norm(x, pending, shift1, scale1, block.norm1.eps)
    pending = Pending(self_attention(block.attn, h, rows, rope), gate1, rows.value_bias)
    x, h = add_and_norm(x, pending, shift2, scale2, block.norm2.eps)
    return x, Pending(swiglu_mlp(block.mlp, h), gate2)


def text_block(block, x, pending, rows: BlockConditioning, text, rope) -> tuple[Tensor, Pending]:
    """Self-attention, cross-attention to text (B, L, C) and MLP; the MLP's output stays pending."""
    m = rows.modulation.chunk(9, dim=-1)
    x, h = add_and_norm(x, pending, m[0], m[1], block.norm1.eps)
    pending = Pending(self_attention(block.attn, h, rows, rope), m[2], rows.value_bias)
    x, h = add_and_norm(x, pending, m[3], m[4], block.norm2_i.eps)
    pending = Pending(cross_attention(block.cross_attn, h, block.norm2_t(text), rope), m[5])
    x, h = add_and_norm(x, pending, m[6], m[7], block.norm3.eps)
    return x, Pending(swiglu_mlp(block.mlp, h), m[8])


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
    return attn.proj(attention(q, k, v).flatten(2))


def cross_attention(attn: nn.Module, h: Tensor, text: Tensor, rope: Rope) -> Tensor:
    heads = _heads(attn, h.shape[-1])
    q = attn.q(h).unflatten(-1, (heads, -1))
    k, v = attn.kv(text).unflatten(-1, (2, heads, -1)).unbind(2)
    eps = _eps(attn.q_norm)
    q = qk_norm_rope(q, None, *_affine(attn.q_norm), grid=rope.grid, order=rope.order, eps=eps)
    if _affine(attn.k_norm)[0] is not None:
        k = qk_norm_rope(k, None, *_affine(attn.k_norm), eps=eps)  # the text has no positions
    return attn.proj(attention(q, k, v).flatten(2))


def swiglu_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """fc2(silu(fc1_g(x))·fc1_x(x)), the two projections as one GEMM."""
    gate, value = mlp.fc1_g, mlp.fc1_x
    is_wrapped = type(gate) is not nn.Linear or type(value) is not nn.Linear  # by LoRA perhaps
    if is_wrapped or torch.compiler.is_compiling():  # where packing is a copy at every call
        return mlp.fc2(swiglu(gate(x), value(x)))
    bias = None if gate.bias is None else pack((gate.bias, value.bias))
    return mlp.fc2(swiglu(F.linear(x, pack((gate.weight, value.weight)), bias)))


def condition_blocks(
    blocks: Sequence[nn.Module], c: Tensor, delta: Tensor
) -> list[BlockConditioning]:
    """Every block's conditioning rows from c and delta (B, C), as grouped GEMMs."""
    mlps = [block.adaLN_modulation for block in blocks]
    first = [layer for mlp in mlps for layer in (mlp.fc1_g, mlp.fc1_x)]
    hidden = _linear(c, first).unflatten(-1, (len(blocks), -1))  # (B, blocks, 2·lora)
    modulation = _grouped_linear(swiglu(hidden).transpose(0, 1), [mlp.fc2 for mlp in mlps])
    if getattr(blocks[0].attn, "qkv_d", None) is None:
        return [BlockConditioning(rows, None, None, None) for rows in modulation.unbind(0)]
    shifts = _linear(delta, [block.attn.qkv_d for block in blocks])
    q, k, v = shifts.unflatten(-1, (len(blocks), 3, -1)).permute(2, 1, 0, 3)  # (blocks, B, C)
    bias = _grouped_linear(v, [block.attn.proj for block in blocks], with_bias=False)
    per_block = zip(modulation.unbind(0), q.unbind(0), k.unbind(0), bias.unbind(0), strict=True)
    return [BlockConditioning(*rows) for rows in per_block]


def _linear(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """Layers that read the same x, side by side: (B, in) → (B, Σ out)."""
    bias = None if layers[0].bias is None else pack([layer.bias for layer in layers])
    return F.linear(x, pack([layer.weight for layer in layers]), bias)


def _grouped_linear(x: Tensor, layers: Sequence[nn.Linear], with_bias: bool = True) -> Tensor:
    """Each layer on its own input: (layers, B, in) → (layers, B, out)."""
    weight = pack([layer.weight for layer in layers]).unflatten(0, (len(layers), -1))
    if not with_bias or layers[0].bias is None:
        return torch.bmm(x, weight.mT)
    bias = pack([layer.bias for layer in layers]).view(len(layers), 1, -1)
    return torch.baddbmm(bias, x, weight.mT)


def embed_patches(proj: nn.Conv2d, x: Tensor) -> Tensor:
    """(B, channels, H, W) → tokens (B, N, C), row-major: the patch convolution as one GEMM."""
    p = proj.kernel_size[0]
    x = x.to(proj.weight.dtype).unflatten(3, (-1, p)).unflatten(2, (-1, p))
    patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, h·w, channels·p·p)
    return F.linear(patches, proj.weight.flatten(1), proj.bias)


def unpatchify(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, h·w, p·p·c) → (B, c, h·p, w·p); a token is laid out (p_row, p_col, channel)."""
    x = x.unflatten(-1, (patch, patch, -1)).unflatten(1, grid)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _time_mlp(embedder: nn.Module) -> TimeMLP:
    first, last = embedder.mlp[0], embedder.mlp[2]
    return TimeMLP(first.weight, first.bias, last.weight, last.bias)


def _heads(attn: nn.Module, width: int) -> int:
    weight = _affine(attn.q_norm)[0]
    return attn.num_heads if weight is None else width // weight.shape[0]


def _affine(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return getattr(norm, "weight", None), getattr(norm, "bias", None)


def _eps(norm: nn.Module) -> float:
    return getattr(norm, "eps", 1e-5)
