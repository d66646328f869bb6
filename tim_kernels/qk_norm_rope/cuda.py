"""Launchers of csrc/qk_norm_rope.cu, as triton.py's; tangents are Triton's, and so is all of heads
too wide for a block."""

import torch
from torch import Tensor

from ..dispatch import extension
from ..launch.calls import Made, Out
from ..launch.dense import call, made_as, one_dtype, read_as, tokens_per_block
from ..launch.shares import MOST, samples_and_length
from ..launch.views import In, view_cond, view_heads, view_vectors
from .frequencies import frequencies
from .gradients import QKV, as_backward, filled, of_qkv, slot
from .positions import is_rotated, period_of, periods_of

THREADS, TOKENS, CHUNK = 288, 2, 8  # as in csrc/heads.cuh and common.cuh
FORWARD_BLOCKS, BACKWARD_BLOCKS = 3, 2  # that a multiprocessor holds
WIDEST = THREADS * CHUNK  # channels of a head that a block has threads for
STAGED = (64, 72, 128)  # head_dims with kernels of their own, csrc/qk_norm_rope_staged.cuh
STAGED_STEP = 8  # tokens of all warps at once, at most


def _strides(x: Tensor) -> tuple[int, ...]:
    """0 for a dimension of one."""
    return tuple(s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True))


def _read_pair(args: tuple, q: int, k: int, dtype: torch.dtype) -> list[In]:
    """Two arguments as the kernels read them: with the same strides, a block's tokens within 2^31
    elements. Views of one packed tensor are so, and contiguous ones; any others are copied."""
    views = view_heads(args, q, k, is_packed=args[-2] is not None)
    given = [args[i] for i in (q, k) if args[i] is not None]
    strides = {_strides(x)[:-1] for x in given}
    is_one = len(strides) == 1 and all(view.change is None for view in views)
    if is_one:
        *_, of_token, of_head = next(iter(strides))
        is_one = MOST * of_token + given[0].shape[-2] * of_head < 2**31
    if not is_one:
        views = view_vectors(args, q, k)
    return read_as(dtype, args, views)


def _read_rows(args: tuple, *rows: int) -> list[In]:
    """Weights and shifts: without gaps, and not float64."""
    read = []
    for i in rows:
        row = args[i]
        (view,) = view_cond(args, i) if row is not None and row.ndim == 2 else view_vectors(args, i)
        is_double = row is None or row.dtype == torch.float64
        read += read_as(torch.float32 if is_double else row.dtype, args, [view])
    return read


def _positions(args: tuple, first: int) -> list:
    """The kernels' arguments from positions to freq; positions are argument `first`."""
    positions, grid, sizes, order = args[first : first + 4]
    if not is_rotated(positions, grid, sizes):
        return [None, 0, None, None]
    q = next(x for x in args if x is not None)
    periods = In(first + 2, change=lambda sizes: periods_of(sizes, order))
    where = *view_vectors(args, first), period_of(grid, order), periods
    return [*where, frequencies(q.shape[-1], q.device)]


def _plan(q, sides, blocks, cu, max_length) -> tuple[int, int, int, int]:
    """(tokens a block, heads a block, tokens side by side, blocks that share their tokens), for
    the heads of one side or of two in one list; a multiprocessor holds `blocks`."""
    H, D = (max(1, n) for n in q.shape[-2:])
    chunks = -(-D // CHUNK)
    columns = -(-sides * H // (THREADS // chunks))
    heads = -(-sides * H // columns)
    samples, length = samples_and_length(q, cu, max_length)
    slots = min(THREADS // (heads * chunks), MOST // TOKENS, max(1, -(-length // TOKENS)))
    step = STAGED_STEP if D in STAGED else TOKENS * slots
    share = tokens_per_block(q, samples * columns, length, blocks, MOST, step)
    return share, heads, slots, columns


def forward(*args):
    """(q', k'), an empty tensor for k' if there is no k."""
    q, k, *_, eps, cu, max_length = args
    if q.shape[-1] > WIDEST:
        return None
    dtype = one_dtype(q, k)
    *plan, _ = _plan(q, 1 if k is None else 2, FORWARD_BLOCKS, cu, max_length)
    return call(
        extension.ops().qk_norm_rope_forward,
        (*_read_pair(args, 0, 1, dtype), *_read_rows(args, *range(2, 8)), *_positions(args, 8),
         Out(0), Out(1), eps, In(13), max_length, *plan),
        (made_as(dtype, q), made_as(dtype, k)), args, is_empty=q.numel() == 0,
    )  # fmt: skip


def _backward(args: tuple, q_and_k: list[In], targets, made, of: tuple, dtype: torch.dtype):
    """Fill `targets`, dq and dk, which are of those `made`, as triton.py's."""
    dq_out, dk_out, q, _, q_weight, k_weight, q_shift, k_shift, *_, eps, cu, max_length = args
    sides = 1 if dq_out is None or dk_out is None else 2
    *plan, columns = _plan(q, sides, BACKWARD_BLOCKS, cu, max_length)
    samples, length = samples_and_length(q, cu, max_length)
    tiles, (H, D) = -(-length // plan[0]), q.shape[-2:]
    is_shifted = q_shift is not None or k_shift is not None
    is_normed = q_weight is not None or k_weight is not None
    shifts = Made((2, samples, tiles, H * D) if is_shifted else (2, 0, 0, H * D), torch.float32)
    affine = Made((4, samples * tiles * columns if is_normed else 0, D), torch.float32)
    sums = Out(len(made)) if is_shifted else None, Out(len(made) + 1) if is_normed else None
    return call(
        extension.ops().qk_norm_rope_backward,
        (*_read_pair(args, 0, 1, dtype), *q_and_k, *_read_rows(args, *range(4, 8)),
         *_positions(args, 8), *targets, *sums, eps, In(13), max_length, *plan),
        (*made, shifts, affine), of,
        finish=lambda *made: (*made[:-2], made[-2].sum(2), made[-1].sum(1)),
        is_empty=q.numel() == 0 or (dq_out is None and dk_out is None),
    )  # fmt: skip


def backward(*args):
    """(dq, dk, shifts, affine), empty those of dq and dk whose gradient does not exist."""
    if args[2].shape[-1] > WIDEST:
        return None
    dtype = one_dtype(*args[:4])
    made = [
        None if gradient is None else made_as(dtype, x)
        for gradient, x in zip(args[:2], args[2:4], strict=True)
    ]
    return _backward(args, _read_pair(args, 2, 3, dtype), (Out(0), Out(1)), made, args, dtype)


def packed_backward(*args):
    """(dqkv, shifts, affine)."""
    if args[QKV].shape[-1] > WIDEST:
        return None
    plain, dtype = as_backward(args), one_dtype(*args[:2], args[QKV])
    pair = _read_pair(plain, 2, 3, dtype)
    q_and_k = [of_qkv(view, which) for which, view in enumerate(pair)]
    targets = [None if args[i] is None else slot((), i) for i in (0, 1)]
    return filled(_backward(plain, q_and_k, targets, (made_as(dtype, args[QKV]),), args, dtype))
