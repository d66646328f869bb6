"""Launchers of csrc/ada_layer_norm.cu, as triton.py's; tangents are Triton's."""

import torch
from torch import Tensor

from ..dispatch import extension
from ..launch.calls import Made, Out
from ..launch.dense import call, made_as, one_dtype, read_as, tokens_per_block
from ..launch.shares import MOST, samples_and_length
from ..launch.views import In, view_cond, view_tokens

FORWARD_STEP = 8  # tokens that a block has at a time, at the published widths
BACKWARD_STEP = {1152: 2, 768: 3}
FORWARD_BLOCKS, BACKWARD_BLOCKS = 4, 2  # that a multiprocessor holds, in bfloat16


def is_fast(x: Tensor) -> bool:
    """Other widths have kernels of a row a block without 16-byte accesses; Triton's are faster."""
    return x.shape[-1] in BACKWARD_STEP


def _read(args: tuple, tokens: range, cond: range) -> tuple[torch.dtype, list[In]]:
    """Tokens in one dtype, conditioning rows in the same if all of them are, else in float32."""
    dtype = one_dtype(*(args[i] for i in tokens))
    is_same = all(args[i] is None or args[i].dtype == dtype for i in cond)
    views = read_as(dtype, args, view_tokens(args, *tokens, is_packed=args[-2] is not None))
    rows = view_cond(args, *cond)
    return dtype, [*views, *read_as(dtype if is_same else torch.float32, args, rows)]


def forward(*args):
    """(x', y), either of them an empty tensor where the op does not make it."""
    x, branch, _, _, _, scale, eps, cu, max_length = args
    dtype, views = _read(args, range(2), range(2, 6))
    samples, length = samples_and_length(x, cu, max_length)
    share = tokens_per_block(x, samples, length, FORWARD_BLOCKS, MOST, FORWARD_STEP)
    return call(
        extension.ops().ada_layer_norm_forward,
        (*views, Out(0), Out(1), eps, In(7), max_length, share),
        [None if made is None else made_as(dtype, x) for made in (branch, scale)], args,
        is_empty=x.numel() == 0,
    )  # fmt: skip


def backward(*args):
    """(dx, dbranch, sums), as triton.py's."""
    _, _, x, branch, *_, eps, cu, max_length = args
    dtype, views = _read(args, range(4), range(4, 7))
    samples, length = samples_and_length(x, cu, max_length)
    step = BACKWARD_STEP.get(x.shape[-1], 1)
    share = tokens_per_block(x, samples, length, BACKWARD_BLOCKS, MOST, step)
    partial = Made((4, samples, -(-length // share), x.shape[-1]), torch.float32)
    return call(
        extension.ops().ada_layer_norm_backward,
        (*views, Out(0), Out(1), Out(2), eps, In(8), max_length, share),
        (made_as(dtype, x), made_as(dtype, branch), partial), args,
        finish=lambda dx, dbranch, partial: (dx, dbranch, partial.sum(2)),
        is_empty=x.numel() == 0,
    )  # fmt: skip
