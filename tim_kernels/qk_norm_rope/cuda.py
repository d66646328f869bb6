"""Launchers of csrc/qk_norm_rope.cu, as triton.py's; tangents are Triton's, and so is all of heads
too wide for a block."""

import torch
from torch import Tensor

from ..dispatch import extension
from ..launch.dense import Reader, one_dtype, tokens_per_block
from ..launch.shares import MOST, samples_and_length
from ..launch.views import View, view_cond, view_heads, view_vector
from .frequencies import frequencies
from .gradients import packed, separate
from .positions import is_rotated, period_of, periods_of

THREADS, TOKENS, CHUNK = 288, 2, 8  # as in csrc/heads.cuh and common.cuh
FORWARD_BLOCKS, BACKWARD_BLOCKS = 3, 2  # that a multiprocessor holds
WIDEST = THREADS * CHUNK  # channels of a head that a block has threads for


def _strides(x: Tensor) -> tuple[int, ...]:
    """0 for a dimension of one."""
    return tuple(s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True))


def _view_pair(is_packed: bool, *pair: Tensor | None) -> list[View]:
    """q and k as the kernels read them: with the same strides, a block's tokens within 2^31
    elements. Views of one packed tensor are so, and contiguous ones; any others are copied."""
    views = [view_heads(x, is_packed) for x in pair]
    given = [(x, view) for x, view in zip(pair, views, strict=True) if x is not None]
    strides = {_strides(x)[:-1] for x, _ in given}
    if len(strides) == 1 and not any(view.is_copied for _, view in given):
        *_, of_token, of_head = next(iter(strides))
        if MOST * of_token + given[0][0].shape[-2] * of_head < 2**31:
            return views
    return [View(view.strides, x is not None and not x.is_contiguous())
            for x, view in zip(pair, views, strict=True)]  # fmt: skip


def _rows(*rows: Tensor | None) -> list:
    """Weights and shifts: without gaps, and not float64."""
    wide = torch.float32
    return [
        (row, wide if row is None or row.dtype == torch.float64 else row.dtype, _view_row(row))
        for row in rows
    ]


def _view_row(row: Tensor | None) -> View:
    return view_cond(row) if row is not None and row.ndim == 2 else view_vector(row)


def _positions(q, positions, grid, sizes, order) -> tuple:
    """The kernels' arguments from positions to freq."""
    if not is_rotated(positions, grid, sizes):
        return None, 0, None, None
    positions = None if positions is None else positions.contiguous()
    freq = frequencies(q.shape[-1], q.device)
    return positions, period_of(grid, order), periods_of(sizes, order), freq


def _plan(q, sides, blocks, cu, max_length) -> tuple[int, int, int, int]:
    """(tokens a block, heads a block, tokens side by side, blocks that share their tokens), for
    the heads of one side or of two in one list; a multiprocessor holds `blocks`."""
    H, D = (max(1, n) for n in q.shape[-2:])
    chunks = -(-D // CHUNK)
    columns = -(-sides * H // (THREADS // chunks))
    heads = -(-sides * H // columns)
    samples, length = samples_and_length(q, cu, max_length)
    slots = min(THREADS // (heads * chunks), MOST // TOKENS, max(1, -(-length // TOKENS)))
    share = tokens_per_block(q, samples * columns, length, blocks, MOST, TOKENS * slots)
    return share, heads, slots, columns


def forward(q, k, *rows_and_tail):
    """(q', k'), an empty tensor for k' if there is no k."""
    if q.shape[-1] > WIDEST:
        return None
    rows, (*_, cu, max_length) = rows_and_tail[:6], rows_and_tail[6:]
    dtype, views = one_dtype(q, k), _view_pair(cu is not None, q, k)
    pairs = ((x, dtype, view) for x, view in zip((q, k), views, strict=True))
    read = Reader(*pairs, *_rows(*rows))
    *plan, _ = _plan(q, 1 if k is None else 2, FORWARD_BLOCKS, cu, max_length)
    launch = extension.ops().qk_norm_rope_forward.default

    def run(q, k, *rows_and_tail):
        rows, (*where, eps, cu, max_length) = rows_and_tail[:6], rows_and_tail[6:]
        dtypes = q.dtype, q.dtype if k is None else k.dtype
        q, k, *rows = read(q, k, *rows)
        q_out = q.new_empty(q.shape)
        k_out = None if k is None else k.new_empty(k.shape)
        if q.numel():
            launch(q, k, *rows, *_positions(q, *where), q_out, k_out, eps, cu, max_length, *plan)
        k_out = q.new_empty(0) if k is None else k_out
        return q_out.to(dtypes[0]), k_out.to(dtypes[1])

    return run


def _backward(dq_out, dk_out, q, k, *rows_tail_and_targets):
    """Fill dq and dk; (shifts, affine), as triton.py's."""
    if q.shape[-1] > WIDEST:
        return None
    rows, (*_, cu, max_length) = rows_tail_and_targets[:4], rows_tail_and_targets[4:-2]
    tensors, is_packed = (dq_out, dk_out, q, k), cu is not None
    dtype = one_dtype(*tensors)
    views = *_view_pair(is_packed, dq_out, dk_out), *_view_pair(is_packed, q, k)
    pairs = ((x, dtype, view) for x, view in zip(tensors, views, strict=True))
    read = Reader(*pairs, *_rows(*rows))
    is_empty = q.numel() == 0 or (dq_out is None and dk_out is None)
    sides = 1 if dq_out is None or dk_out is None else 2
    *plan, columns = _plan(q, sides, BACKWARD_BLOCKS, cu, max_length)
    samples, length = samples_and_length(q, cu, max_length)
    tiles, (H, D) = -(-length // plan[0]), q.shape[-2:]
    make = torch.zeros if is_empty else torch.empty
    q_weight, k_weight, q_shift, k_shift = rows
    is_shifted = q_shift is not None or k_shift is not None
    is_normed = q_weight is not None or k_weight is not None
    launch = extension.ops().qk_norm_rope_backward.default

    def run(dq_out, dk_out, q, k, *rows_tail_and_targets):
        *where, eps, cu, max_length, dq, dk = rows_tail_and_targets[4:]
        targets, device = (dq, dk), q.device
        dq_out, dk_out, q, k, *rows = read(dq_out, dk_out, q, k, *rows_tail_and_targets[:4])
        dq, dk = (
            x if x is None or x.dtype == dtype else x.new_empty(x.shape, dtype=dtype)
            for x in targets
        )
        shifts = affine = None
        if is_shifted:
            shifts = make((2, samples, tiles, H * D), dtype=torch.float32, device=device)
        if is_normed:
            affine = make((4, samples * tiles * columns, D), dtype=torch.float32, device=device)
        if not is_empty:
            launch(
                dq_out, dk_out, q, k, *rows, *_positions(q, *where), dq, dk, shifts, affine,
                eps, cu, max_length, *plan,
            )  # fmt: skip
        for target, made in zip(targets, (dq, dk), strict=True):
            if target is not made:
                target.copy_(made)
        return (
            q.new_empty((2, 0, H * D), dtype=torch.float32) if shifts is None else shifts.sum(2),
            q.new_empty((4, D), dtype=torch.float32) if affine is None else affine.sum(1),
        )

    return run


backward, packed_backward = separate(_backward), packed(_backward)
