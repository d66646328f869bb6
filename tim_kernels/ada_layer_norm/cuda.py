"""Launchers of csrc/ada_layer_norm.cu, as triton.py's; tangents are Triton's."""

from typing import NamedTuple

import torch

from ..dispatch import extension
from ..launch.calls import Call, Made, Out
from ..launch.dense import call, made_as, one_dtype, read_as, tokens_per_block
from ..launch.shares import MOST, samples_and_length
from ..launch.views import In, view_cond, view_modulation, view_tokens, view_vectors
from .forms import is_of_token, sums

FORWARD_STEP = 8  # tokens that a block has at a time, at the published widths
BACKWARD_STEP = {1152: 2, 768: 3}
FORWARD_BLOCKS, BACKWARD_BLOCKS = 4, 2  # that a multiprocessor holds, in bfloat16


def is_fast(*args) -> bool:
    """Other widths, conditioning of each token, a norm with a weight and RMSNorm have kernels of a
    row a block without 16-byte accesses; Triton's are faster."""
    x = next(tensor for tensor in args if tensor is not None)
    branch, *cond = args[1:6] if len(args) == 12 else args[3:7]
    given = () if branch is None else (cond[0],)
    given += () if args[-3] is None else tuple(cond[2:])
    is_plain = args[-6:-4] == (None, None) and args[-3] in (None, "layer")
    is_rows = all(each is not None and each.ndim == 2 for each in given)
    return x.shape[-1] in BACKWARD_STEP and is_plain and is_rows


class Reading(NamedTuple):
    """How the kernels read a call: tokens in one dtype, conditioning in the same if all of it is,
    else in float32."""

    dtype: torch.dtype
    cond_dtype: torch.dtype
    views: list[In]


def _read(args: tuple, tokens: range, cond: range) -> Reading | None:
    """`cond` are gate, bias, …, weight, norm_bias; None where conditioning of each token would have
    to be read in another dtype."""
    dtype = one_dtype(*(args[i] for i in tokens))
    is_same = all(args[i] is None or args[i].dtype == dtype for i in cond)
    cond_dtype = dtype if is_same else torch.float32
    if any(is_of_token(args[i]) and args[i].dtype != cond_dtype for i in cond):
        return None
    gate, bias, *rest, weight, norm_bias = cond
    views = [
        *view_modulation(args, gate), *view_cond(args, bias), *view_modulation(args, *rest),
        *view_vectors(args, weight, norm_bias),
    ]  # fmt: skip
    x = view_tokens(args, *tokens, is_packed=args[-2] is not None)
    return Reading(dtype, cond_dtype, [*read_as(dtype, args, x), *read_as(cond_dtype, args, views)])


def forward(*args) -> Call | None:
    """(x', y), either of them an empty tensor where the op does not make it."""
    x, branch, *_, eps, norm, cu, max_length = args
    reading = _read(args, range(2), range(2, 8))
    if reading is None:
        return None
    samples, length = samples_and_length(x, cu, max_length)
    share = tokens_per_block(x, samples, length, FORWARD_BLOCKS, MOST, FORWARD_STEP)
    made = branch, None if norm is None else x
    return call(
        extension.ops().ada_layer_norm_forward,
        (*reading.views, Out(0), Out(1), eps, norm == "rms", In(10), max_length, share),
        [None if each is None else made_as(reading.dtype, x) for each in made], args,
        is_empty=x.numel() == 0,
    )  # fmt: skip


def backward(*args) -> Call | None:
    """(dx, dbranch, dgate, dscale, sums), as triton.py's."""
    _, _, x, branch, gate, _, scale, _, norm_bias, eps, norm, cu, max_length = args
    reading = _read(args, range(4), range(4, 9))
    if reading is None:
        return None
    samples, length = samples_and_length(x, cu, max_length)
    step = BACKWARD_STEP.get(x.shape[-1], 1)
    share = tokens_per_block(x, samples, length, BACKWARD_BLOCKS, MOST, step)
    totals = sums(scale, norm_bias), samples, -(-length // share), x.shape[-1]
    cond = (made_as(reading.cond_dtype, c) if is_of_token(c) else None for c in (gate, scale))
    return call(
        extension.ops().ada_layer_norm_backward,
        (*reading.views, *map(Out, range(5)), eps, norm == "rms", In(11), max_length, share),
        (made_as(reading.dtype, x), made_as(reading.dtype, branch), *cond,
         Made(totals, torch.float32)), args,
        finish=lambda *made: (*made[:4], made[4].sum(2)),
        is_empty=x.numel() == 0,
    )  # fmt: skip
