"""Launchers of csrc/qk_norm_rope.cu, with the arguments of triton.py's; tangents are Triton's."""

import functools

import torch
from torch import Tensor

from ..dispatch.extension import one_dtype, tangents_in_triton, tokens_per_block
from ..launch.views import head_view, row_view, samples_and_length
from .frequencies import frequencies

THREADS, TOKENS, CHUNK = 288, 2, 8  # as in csrc/heads.cuh and common.cuh
MOST = 64  # tokens a block: partial sums are then a few percent of what is read
FORWARD_BLOCKS, BACKWARD_BLOCKS = 3, 2  # that a multiprocessor holds
WIDEST = THREADS * CHUNK  # channels of a head that a block has threads for


def _unless_wide(launcher):
    """`launcher`, but Triton's of that name for heads too wide for a block."""

    @functools.wraps(launcher)
    def launch(*args):
        if next(x for x in args if x is not None).shape[-1] <= WIDEST:
            return launcher(*args)
        from . import triton

        return getattr(triton, launcher.__name__)(*args)

    return launch


def _strides(x: Tensor) -> tuple[int, ...]:
    """0 for a dimension of one."""
    return tuple(s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True))


def _heads(is_packed: bool, *tensors: Tensor | None) -> list[Tensor | None]:
    """q and k as the kernels read them: with the same strides, a block's tokens within 2^31
    elements. Views of one packed tensor are so, and contiguous ones; any others are copied."""
    tensors = [head_view(x, is_packed).tensor for x in tensors]
    strides = {_strides(x)[:-1] for x in tensors if x is not None}
    if len(strides) == 1:
        *_, of_token, of_head = next(iter(strides))
        heads = next(x.shape[-2] for x in tensors if x is not None)
        if MOST * of_token + heads * of_head < 2**31:
            return tensors
    return [None if x is None else x.contiguous() for x in tensors]


def _row(row: Tensor | None) -> Tensor | None:
    """A row that the kernels read: without gaps, and not float64."""
    if row is None:
        return None
    return row_view(row.float() if row.dtype == torch.float64 else row).tensor


def _places(positions, divisor, divisors, head_dim, device):
    """The kernels' arguments from positions to freq."""
    is_turned = positions is not None or divisors is not None or divisor
    positions = None if positions is None else positions.contiguous()
    return positions, divisor, divisors, frequencies(head_dim, device) if is_turned else None


def _plan(q, sides, blocks, cu, max_length) -> tuple[int, int, int, int]:
    """(tokens a block, heads a block, tokens side by side, blocks that share their tokens), for
    the heads of one side or of two in one list; a multiprocessor holds `blocks`."""
    H, D = (max(1, n) for n in q.shape[-2:])
    chunks = -(-D // CHUNK)
    columns = -(-sides * H // (THREADS // chunks))
    heads = -(-sides * H // columns)
    samples, length = samples_and_length(q, cu, max_length)
    slots = min(THREADS // (heads * chunks), MOST // TOKENS, max(1, -(-length // TOKENS)))
    rows = tokens_per_block(q, samples * columns, length, blocks, MOST, TOKENS * slots)
    return rows, heads, slots, columns


@_unless_wide
def forward(
    q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift,
    positions, divisor, divisors, eps, cu, max_length,
):  # fmt: skip
    """(q', k'), an empty tensor for k' if there is no k."""
    dtypes = [q.dtype, q.dtype if k is None else k.dtype]
    q, k = _heads(cu is not None, *one_dtype(q, k))
    q_out = q.new_empty(q.shape)
    k_out = None if k is None else k.new_empty(k.shape)
    if q.numel():
        *plan, _ = _plan(q, 1 if k is None else 2, FORWARD_BLOCKS, cu, max_length)
        torch.ops.tim_kernels_cuda.qk_norm_rope_forward(
            q, k, *map(_row, (q_weight, q_bias, k_weight, k_bias, q_shift, k_shift)),
            *_places(positions, divisor, divisors, q.shape[-1], q.device),
            q_out, k_out, eps, cu, max_length, *plan,
        )  # fmt: skip
    k_out = q.new_empty(0) if k is None else k_out
    return q_out.to(dtypes[0]), k_out.to(dtypes[1])


@_unless_wide
def backward(
    dq_out, dk_out, q, k, q_weight, k_weight, q_shift, k_shift,
    positions, divisor, divisors, eps, cu, max_length, dq, dk,
):  # fmt: skip
    """Fill those of dq and dk that are not None; returns (shifts, affine), as triton.py's."""
    targets = dq, dk
    dq_out, dk_out, q, k = one_dtype(dq_out, dk_out, q, k)
    q, k = _heads(cu is not None, q, k)
    dq_out, dk_out = _heads(cu is not None, dq_out, dk_out)
    dq, dk = (
        x if x is None or x.dtype == q.dtype else x.new_empty(x.shape, dtype=q.dtype)
        for x in targets
    )
    is_empty = q.numel() == 0 or (dq is None and dk is None)
    sides = 1 if dq is None or dk is None else 2
    *plan, columns = _plan(q, sides, BACKWARD_BLOCKS, cu, max_length)
    samples, length = samples_and_length(q, cu, max_length)
    tiles = -(-length // plan[0])
    make = functools.partial(
        torch.zeros if is_empty else torch.empty, dtype=torch.float32, device=q.device
    )
    H, D = q.shape[-2:]
    shifts = affine = None
    if q_shift is not None or k_shift is not None:
        shifts = make((2, samples, tiles, H * D))
    if q_weight is not None or k_weight is not None:
        affine = make((4, samples * tiles * columns, D))
    if not is_empty:
        torch.ops.tim_kernels_cuda.qk_norm_rope_backward(
            dq_out, dk_out, q, k, *map(_row, (q_weight, k_weight, q_shift, k_shift)),
            *_places(positions, divisor, divisors, D, q.device),
            dq, dk, shifts, affine, eps, cu, max_length, *plan,
        )  # fmt: skip
    for target, made in zip(targets, (dq, dk), strict=True):
        if target is not made:
            target.copy_(made)
    return (
        make((2, 0, H * D)) if shifts is None else shifts.sum(2),
        make((4, D)) if affine is None else affine.sum(1),
    )


jvp = tangents_in_triton("qk_norm_rope")
