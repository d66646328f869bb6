"""TiM on the fused ops, as functions over a tree of modules with the published names.

`predict` is the network. It is cut in two, for whoever runs one part more often than the other:
`prepare` makes of times, labels and text what the blocks need, and `run` carries tokens through
the blocks. Which class the modules are does not matter; all of them are called as modules, and
weights stay where they are. `tim.models` runs on these functions, and `accelerate` makes somebody
else's model of the same tree do so.

What is fused beyond single ops: the gated residual of a sub-layer is taken up by the next norm;
the per-sample bias of the values passes through attention as a constant, since softmax rows sum to
one. Conditioning stays one row a sample.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..segments import Segments
from ..time_pair_embedding.op import time_pair_embedding
from .attentions import Rope, TextKeys
from .blocks import (
    BlockRows,
    condition_block,
    final_layer,
    final_rows,
    norm_text,
    take_up,
    text_keys,
)
from .checkpointing import checkpointed
from .forward_mode import lean
from .layers import are_paths_shorter, is_quiet, is_sharded, plain_time_mlp, unpatchify
from .packing import Packing


class Prepared(NamedTuple):
    """What the tokens meet on their way, of B samples; it holds no tokens and no positions."""

    c: Tensor  # (B, C), the conditioning
    delta: Tensor  # (B, C), the embedding of the pair of times
    text: Tensor | list[TextKeys] | None  # (B, L, C) or every block's; None for classes
    rows: Sequence[BlockRows] | None = None  # of every block; None: each forms its own
    final: tuple[Tensor, Tensor] | None = None  # shift and scale (B, C) of the last norm


@lean
def predict(
    model: nn.Module,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    y: Tensor | list[TextKeys],
    *,
    new_condition: str,
    rope_order: str,
    features_depth: int | None = None,
    checkpoint: Callable | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor | None]:
    """F(x, t, r, y) and, projected, the output of block `features_depth` (1-based).

    x is (B, channels, H, W), or with a `packing` of B pictures (T, channels, p, p) as `pack` makes
    it; t and r are (B,) network times, y labels (B,), text features (B, L, D) or what `read_text`
    made of them. The first result is shaped as x, the second (B, N, z_dim) or (T, z_dim). Each
    block forms its own rows, keys and values while it runs: those of one block are held at a time,
    and checkpointing, by the function `checkpoint` around each block or inside the blocks, forms
    them again.
    Nothing is checked here.
    """
    prepared = _embed(model, t, r, y, new_condition)
    return run(
        model, x, prepared, rope_order=rope_order, features_depth=features_depth,
        checkpoint=checkpoint, packing=packing,
    )  # fmt: skip


@lean
def prepare(
    model: nn.Module, t: Tensor, r: Tensor, y: Tensor | list[TextKeys], *, new_condition: str
) -> Prepared:
    """Everything in F(x, t, r, y) that does not depend on x, for one call of `run` or many.

    With FSDP2 blocks form their own rows, keys and values: their weights are whole there alone.
    """
    prepared = _embed(model, t, r, y, new_condition)
    c, delta, text, *_ = prepared
    if any(map(is_sharded, model.blocks)):
        return prepared
    if isinstance(text, Tensor):
        text = [text_keys(block, text) for block in model.blocks]
    paths = are_paths_shorter(c.device)
    rows = [condition_block(block, c, delta, paths) for block in model.blocks]
    final = final_rows(model.final_layer, c) if is_quiet(model.final_layer) else None
    return Prepared(c, delta, text, rows, final)


def read_text(model: nn.Module, y: Tensor) -> list[TextKeys]:
    """Every block's keys and values of text features y (B, L, D), for many calls of `predict`
    with the same text: they depend on no time. They are (B, L, 2C) a block to keep."""
    text = model.y_embedder(y)
    return [text_keys(block, text) for block in model.blocks]


def _embed(model, t: Tensor, r: Tensor, y, condition: str) -> Prepared:
    t_embedding, delta = _embed_times(model, t, r, condition)
    c = t_embedding + delta
    if not hasattr(model.y_embedder, "embedding_table"):
        return Prepared(c, delta, model.y_embedder(y) if isinstance(y, Tensor) else y)
    return Prepared(c + model.y_embedder(y), delta, None)


def _embed_times(model, t: Tensor, r: Tensor, condition: str) -> tuple[Tensor, Tensor]:
    """T(t) and the embedding of the pair: one op if nobody looks on, else by calling embedders."""
    embedders = model.t_embedder, getattr(model, "delta_embedder", None) or model.t_embedder
    t_mlp, delta_mlp = map(plain_time_mlp, embedders)
    if t_mlp is not None and delta_mlp is not None:
        return time_pair_embedding(t, r, t_mlp, delta_mlp, condition)
    T, D = embedders
    *summands, last = condition.split(",")
    t_embedding, delta = T(t), D(t - r if last == "t-r" else r)
    for time in summands:
        delta = delta + (t_embedding if time == "t" else T(r))
    return t_embedding, delta


@lean
def run(
    model: nn.Module,
    x: Tensor,
    prepared: Prepared,
    *,
    rope_order: str,
    features_depth: int | None = None,
    checkpoint: Callable | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Carry x (B, channels, H, W) or (T, channels, p, p) through the blocks: see `predict`."""
    c, delta, text, rows, final = prepared
    patch = model.x_embedder.proj.kernel_size[0]
    rope = _rope(x, patch, text, rope_order, packing)
    x, pending, features = model.x_embedder(x), None, None
    if packing is not None:
        x = x.flatten(0, 1)  # of pictures of one token each
    if isinstance(text, Tensor):
        text = norm_text(model.blocks, text)
    for i, block in enumerate(model.blocks):
        if not is_quiet(block):  # somebody may look at its input
            x, pending = take_up(x, pending, rope.segments), None
        keys = text[i] if isinstance(text, list) else text
        args = x, pending, c, delta, keys, rope, None if rows is None else rows[i]
        if checkpoint is not None and torch.is_grad_enabled():
            out = checkpointed(checkpoint, nn.Module.__call__, block, *args)
        else:
            out = block(*args)
        x, pending = out if isinstance(out, tuple) else (out, None)
        if i + 1 == features_depth:
            x, pending = take_up(x, pending, rope.segments), None
            features = model.projector(x)
    out = _leave(model.final_layer, x, c, pending, final, packing)
    if packing is not None:
        return unpatchify(out.unflatten(0, (-1, 1)), (1, 1), patch), features
    return unpatchify(out, rope.grid, patch), features


def _rope(x: Tensor, patch: int, text, order: str, packing: Packing | None) -> Rope:
    asked = dict(paths=are_paths_shorter(x.device), gradients=torch.is_grad_enabled())
    if packing is None:
        return Rope((x.shape[2] // patch, x.shape[3] // patch), order, **asked)
    of_text = None, None
    if text is not None:
        length = (text if isinstance(text, Tensor) else text[0].k).shape[1]
        if packing.texts is None:
            of_text = Segments.alike(len(packing), length, x.device), None
        elif packing.texts.longest == length:
            of_text = packing.texts[:2]
        else:
            raise ValueError(
                f"texts must be of {packing.texts.longest} tokens, as the packing reads them; "
                f"got {length}"
            )
    return Rope(None, order, packing.grids, packing.segments, *of_text, **asked)


def _leave(layer, x: Tensor, c: Tensor, pending, final, packing: Packing | None) -> Tensor:
    """The last layer; to whoever looks at it packed tokens are samples of one token each."""
    segments = None if packing is None else packing.segments
    if is_quiet(layer):
        return final_layer(layer, x, c, pending, final, segments)
    x = take_up(x, pending, segments)
    if packing is None:
        return layer(x, c)
    return layer(x.unflatten(0, (-1, 1)), packing.spread(c)).flatten(0, 1)
