"""TiM on the fused ops, as functions over a tree of modules with the published names.

`predict` is the network. It is cut in two, for whoever runs one part more often than the other:
`prepare` makes of times, labels and text what the blocks need, and `run` carries tokens through
the blocks. The functions read weights and call layers; which class the modules are does not
matter. `tim.models` runs on them, and `accelerate` makes somebody else's model of the same tree
do so.

What is fused beyond single ops: the gated residual of a sub-layer is taken up by the next norm;
the conditioning of all blocks is a few grouped GEMMs before the first block; the per-sample bias
of the values passes through attention as a constant, since softmax rows sum to one; projections
that read the same input are one GEMM. Conditioning stays one row a sample.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..ada_layer_norm.op import gated_residual
from ..time_pair_embedding.op import time_pair_embedding
from .blocks import Rope, TextKeys, add_and_norm, text_keys
from .conditioning import BlockConditioning, can_group, condition_blocks
from .forward_mode import lean
from .layers import embed_patches, swiglu_mlp, time_mlp, unpatchify


class Prepared(NamedTuple):
    """What the tokens meet on their way, of B samples; it holds no tokens and no positions."""

    c: Tensor  # (B, C), the conditioning
    delta: Tensor  # (B, C), the embedding of the pair of times
    rows: Sequence[BlockConditioning] | None  # of every block; None: each forms its own
    text: Tensor | Sequence[TextKeys] | None  # (B, L, C) or every block's; None for classes
    final: tuple[Tensor, Tensor]  # shift and scale (B, C) of the last norm


@lean
def predict(
    model: nn.Module,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    y: Tensor,
    *,
    new_condition: str,
    rope_order: str,
    features_depth: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """F(x, t, r, y) and, projected, the output of block `features_depth` (1-based).

    x is (B, channels, H, W), t and r are (B,) network times, y labels (B,) or text features
    (B, L, D). Nothing is checked here.
    """
    prepared = prepare(model, t, r, y, new_condition=new_condition)
    return run(model, x, prepared, rope_order=rope_order, features_depth=features_depth)


@lean
def prepare(
    model: nn.Module,
    t: Tensor,
    r: Tensor,
    y: Tensor | Sequence[TextKeys],
    *,
    new_condition: str,
) -> Prepared:
    """Everything in F(x, t, r, y) that does not depend on x.

    t and r are (B,) network times, y labels (B,), text features (B, L, D), or what `read_text`
    made of them. From features each block forms its keys and values while it runs: then those of
    one block are held at a time, forward and backward, and checkpointing forms them again.
    """
    delta_embedder = getattr(model, "delta_embedder", None)
    c, delta = time_pair_embedding(
        t,
        r,
        time_mlp(model.t_embedder),
        None if delta_embedder is None else time_mlp(delta_embedder),
        new_condition,
    )
    c = c + delta
    is_grouped, text = can_group(model), None
    if hasattr(model.y_embedder, "embedding_table"):
        c = c + F.embedding(y, model.y_embedder.embedding_table.weight)
    elif isinstance(y, Tensor):
        text = embed_text(model.y_embedder, y, is_grouped)
    else:
        text = y
    rows = condition_blocks(model.blocks, c, delta) if is_grouped else None
    final = swiglu_mlp(model.final_layer.adaLN_modulation, c, is_grouped).chunk(2, dim=-1)
    return Prepared(c, delta, rows, text, final)


def read_text(model: nn.Module, y: Tensor) -> list[TextKeys]:
    """Every block's keys and values of text features y (B, L, D), for many calls of `prepare`
    with the same text: they depend on no time. They are (B, L, 2C) a block to keep."""
    text = embed_text(model.y_embedder, y, can_group(model))
    return [text_keys(block, text) for block in model.blocks]


def embed_text(y_embedder: nn.Module, y: Tensor, packed: bool) -> Tensor:
    """Text features (B, L, D) → (B, L, C)."""
    norm = y_embedder.norm
    return swiglu_mlp(y_embedder.mlp, norm(y.to(norm.weight.dtype)), packed)


@lean
def run(
    model: nn.Module,
    x: Tensor,
    prepared: Prepared,
    *,
    rope_order: str,
    features_depth: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Carry x (B, channels, H, W) through the blocks: see `predict`."""
    c, delta, rows, text, (shift, scale) = prepared
    patch = model.x_embedder.proj.kernel_size[0]
    rope = Rope((x.shape[2] // patch, x.shape[3] // patch), rope_order)
    x = embed_patches(model.x_embedder.proj, x)
    pending, features = None, None
    for i, block in enumerate(model.blocks):
        keys = text if text is None or isinstance(text, Tensor) else text[i]
        own = None if rows is None else rows[i]
        x, pending = block(x, pending, c, delta, keys, rope, own)
        if i + 1 == features_depth:
            x, pending = gated_residual(x, pending.branch, pending.gate, pending.bias), None
            features = model.projector(x)
    _, out = add_and_norm(x, pending, shift, scale, model.final_layer.norm_final.eps)
    return unpatchify(model.final_layer.linear(out), rope.grid, patch), features
