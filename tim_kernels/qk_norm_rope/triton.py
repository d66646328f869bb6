"""Triton kernels of QK-norm and axial RoPE for queries and keys in one launch.

Per token and head, for q and for k if there is one:

    y = RoPE(LN(x + shift)·weight + bias)      each part left out when its tensor is None

A tile is T tokens × HB heads, flattened to rows of D channels in two power-of-two pieces (rows.py),
so that head_dim 72 costs 64 + 8 lanes; both pieces are even and no pair straddles them. The angles
of a token are formed once, as (T, pairs), and shared by all heads of a tile, in forward and tangent
by q and k as well (backward takes q and k in turn, for half the registers). Pairs are taken apart
by tl.reshape and tl.split, which is renaming of registers where a thread holds whole pairs: 928
instructions of a forward at head_dim 72, against 1216 with partners swapped by an exclusive-or
reduction.

LayerNorm statistics are recomputed in backward and tangent, as the rows are in registers anyway.
In backward each thread keeps its rows' sums over the tokens in registers, and a program has
columns of HB heads; sums over programs are torch.sum's.

In the kernels xa, xb are the two pieces of a row, g gradients, t tangents, and `turn` is
(cos, sin, cos, sin) of the pairs of the two pieces.
"""

import functools

import torch
import triton
import triton.language as tl

from ..launch import Plan, RowView, head_view, kernel, row_view
from ..rows import (
    load_row,
    locate,
    normalise,
    normalise_linear,
    pieces,
    store_row,
    store_rows,
)
from ..tuning import tuned
from . import reference
from .rotation import axial_turn, rotate


@triton.jit
def _load(ptr, offset, is_row, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Rows that start at `offset` (R,) as float32 pieces; zeros if ptr is None."""
    if ptr is None:
        zero = tl.zeros_like(offset).to(tl.float32)[:, None]
        return zero + tl.zeros((1, A), tl.float32), zero + tl.zeros((1, B), tl.float32)
    else:
        start = ptr + offset[:, None]
        column_a, column_b = tl.arange(0, A)[None, :], A + tl.arange(0, B)[None, :]
        a = tl.load(start + column_a, mask=is_row[:, None] & (column_a < D), other=0.0)
        b = tl.load(start + column_b, mask=is_row[:, None] & (column_b < D), other=0.0)
        return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _load_heads(
    x_ptr, x_b, x_n, x_h, shift_ptr, shift_s, sample, row, head, is_row,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """x + shift of heads `head` (R,) of tokens `row` (R,)."""
    head = head.to(tl.int64)
    xa, xb = _load(x_ptr, (sample * x_b + row * x_n + head * x_h) * ALIGN, is_row, D, A, B)
    if shift_ptr is not None:
        sa, sb = _load(shift_ptr, sample * shift_s * ALIGN + head * D, is_row, D, A, B)
        xa, xb = xa + sa, xb + sb
    return xa, xb


@triton.jit
def _store_heads(
    x_ptr, x_b, x_n, x_h, sample, row, head, is_row, a, b,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    start = x_ptr + ((sample * x_b + row * x_n + head.to(tl.int64) * x_h) * ALIGN)[:, None]
    column_a, column_b = tl.arange(0, A)[None, :], A + tl.arange(0, B)[None, :]
    tl.store(start + column_a, a, mask=is_row[:, None] & (column_a < D))
    tl.store(start + column_b, b, mask=is_row[:, None] & (column_b < D))


@triton.jit
def _forward_heads(
    x_ptr, x_b, x_n, x_h, weight_ptr, bias_ptr, shift_ptr, shift_s, freq_ptr, turn, y_ptr, eps,
    sample, row, row_out, head, is_row, H: tl.constexpr, D: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, T: tl.constexpr, HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    xa, xb = _load_heads(
        x_ptr, x_b, x_n, x_h, shift_ptr, shift_s, sample, row, head, is_row, D, A, B, ALIGN
    )
    if weight_ptr is not None:
        wa, wb = load_row(weight_ptr, 0, 0, ALIGN, D, A, B)
        ba, bb = load_row(bias_ptr, 0, 0, ALIGN, D, A, B)
        xa, xb, _ = normalise(xa, xb, eps, D, A, B)
        xa, xb = xa * wa + ba, xb * wb + bb
    xa, xb = rotate(xa, xb, turn, 1.0, freq_ptr, T, HB, A, B)
    store_rows(y_ptr, row_out * H + head, is_row, xa, xb, D, A, B)


@kernel
def _forward_kernel(
    cu_ptr, length, tiles, rows_per_program, q_ptr, q_b, q_n, q_h, k_ptr, k_b, k_n, k_h,
    q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,
    q_shift_ptr, q_shift_s, k_shift_ptr, k_shift_s,
    position_ptr, position_b, divisor, divisors_ptr, divisors_s, freq_ptr,
    q_out_ptr, k_out_ptr, eps, H: tl.constexpr, D: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, T: tl.constexpr, HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    n = tile * T + tl.arange(0, T)
    turn = axial_turn(
        freq_ptr, position_ptr, position_b, divisor, divisors_ptr, divisors_s,
        sample, first, n, n < span, D, A, B, ALIGN,
    )  # fmt: skip
    token, head = tile * T + tl.arange(0, T * HB) // HB, tl.arange(0, T * HB) % HB
    row, row_out, is_row = first + token, first_out + token, token < span
    for begin in range(0, H, HB):
        _forward_heads(
            q_ptr, q_b, q_n, q_h, q_weight_ptr, q_bias_ptr, q_shift_ptr, q_shift_s, freq_ptr, turn,
            q_out_ptr, eps, sample, row, row_out, begin + head, is_row, H, D, A, B, T, HB, ALIGN,
        )  # fmt: skip
        if k_ptr is not None:
            _forward_heads(
                k_ptr, k_b, k_n, k_h, k_weight_ptr, k_bias_ptr, k_shift_ptr, k_shift_s,
                freq_ptr, turn, k_out_ptr, eps,
                sample, row, row_out, begin + head, is_row, H, D, A, B, T, HB, ALIGN,
            )  # fmt: skip


@triton.jit
def _backward_heads(
    cu_ptr, length, tiles, rows_per_program, dy_ptr, dy_b, dy_n, dy_h, x_ptr, x_b, x_n, x_h,
    weight_ptr, shift_ptr, shift_s,
    position_ptr, position_b, divisor, divisors_ptr, divisors_s, freq_ptr,
    dx_ptr, dx_b, dx_n, dx_h, dshift_ptr, affine_ptr, step, eps,
    H: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
    HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dx, and this program's part of dshift (programs, H, D) and of dweight, dbias
    (2, programs·columns, D)."""
    sample, tile, first, _, span = locate(cu_ptr, length, tiles)
    start, stop = tile * rows_per_program, min((tile + 1) * rows_per_program, span)
    program = tl.program_id(0).to(tl.int64)
    column = 0 if H == HB else tl.program_id(1)
    head = column * HB + tl.arange(0, T * HB) % HB
    za, zb = tl.zeros((T * HB, A), tl.float32), tl.zeros((T * HB, B), tl.float32)
    dshift_a, dshift_b, dweight_a, dweight_b, dbias_a, dbias_b = za, zb, za, zb, za, zb
    for begin in range(start, stop, T):
        n = begin + tl.arange(0, T)
        turn = axial_turn(
            freq_ptr, position_ptr, position_b, divisor, divisors_ptr, divisors_s,
            sample, first, n, n < stop, D, A, B, ALIGN,
        )  # fmt: skip
        token = begin + tl.arange(0, T * HB) // HB
        row, is_row = first + token, token < stop
        ga, gb = _load_heads(
            dy_ptr, dy_b, dy_n, dy_h, None, 0, sample, row, head, is_row, D, A, B, ALIGN
        )
        ga, gb = rotate(ga, gb, turn, -1.0, freq_ptr, T, HB, A, B)
        if weight_ptr is not None:
            xa, xb = _load_heads(
                x_ptr, x_b, x_n, x_h, shift_ptr, shift_s, sample, row, head, is_row, D, A, B, ALIGN
            )
            xa, xb, rstd = normalise(xa, xb, eps, D, A, B, APART=A != B)
            dbias_a, dbias_b = dbias_a + ga, dbias_b + gb
            dweight_a, dweight_b = dweight_a + ga * xa, dweight_b + gb * xb
            wa, wb = load_row(weight_ptr, 0, 0, ALIGN, D, A, B)
            ga, gb = normalise_linear(xa, xb, rstd, ga * wa, gb * wb, D, APART=A != B)
        if shift_ptr is not None:
            dshift_a, dshift_b = dshift_a + ga, dshift_b + gb
        _store_heads(dx_ptr, dx_b, dx_n, dx_h, sample, row, head, is_row, ga, gb, D, A, B, ALIGN)

    if shift_ptr is not None:
        dshift_a = tl.sum(tl.reshape(dshift_a, (T, HB, A)), 0)
        dshift_b = tl.sum(tl.reshape(dshift_b, (T, HB, B)), 0)
        head = program * H + column * HB + tl.arange(0, HB)
        store_rows(dshift_ptr, head, head >= 0, dshift_a, dshift_b, D, A, B)
    if weight_ptr is not None:
        affine_ptr += (program * (H // HB) + column) * D
        store_row(affine_ptr, tl.sum(dweight_a, 0), tl.sum(dweight_b, 0), D, A, B)
        affine_ptr += tl.cast(step, tl.int64) * (H // HB * D)
        store_row(affine_ptr, tl.sum(dbias_a, 0), tl.sum(dbias_b, 0), D, A, B)


@kernel
def _backward_kernel(
    cu_ptr, length, tiles, rows_per_program,
    dq_out_ptr, dq_out_b, dq_out_n, dq_out_h, dk_out_ptr, dk_out_b, dk_out_n, dk_out_h,
    q_ptr, q_b, q_n, q_h, k_ptr, k_b, k_n, k_h, q_weight_ptr, k_weight_ptr,
    q_shift_ptr, q_shift_s, k_shift_ptr, k_shift_s,
    position_ptr, position_b, divisor, divisors_ptr, divisors_s, freq_ptr,
    dq_ptr, dq_b, dq_n, dq_h, dk_ptr, dk_b, dk_n, dk_h,
    q_dshift_ptr, k_dshift_ptr, q_affine_ptr, k_affine_ptr, step, eps,
    H: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
    HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    if dq_out_ptr is not None:
        _backward_heads(
            cu_ptr, length, tiles, rows_per_program, dq_out_ptr, dq_out_b, dq_out_n, dq_out_h,
            q_ptr, q_b, q_n, q_h, q_weight_ptr, q_shift_ptr, q_shift_s,
            position_ptr, position_b, divisor, divisors_ptr, divisors_s, freq_ptr,
            dq_ptr, dq_b, dq_n, dq_h, q_dshift_ptr, q_affine_ptr, step, eps,
            H, D, A, B, T, HB, ALIGN,
        )  # fmt: skip
    if dk_out_ptr is not None:
        _backward_heads(
            cu_ptr, length, tiles, rows_per_program, dk_out_ptr, dk_out_b, dk_out_n, dk_out_h,
            k_ptr, k_b, k_n, k_h, k_weight_ptr, k_shift_ptr, k_shift_s,
            position_ptr, position_b, divisor, divisors_ptr, divisors_s, freq_ptr,
            dk_ptr, dk_b, dk_n, dk_h, k_dshift_ptr, k_affine_ptr, step, eps,
            H, D, A, B, T, HB, ALIGN,
        )  # fmt: skip


@triton.jit
def _jvp_heads(
    x_ptr, x_b, x_n, x_h, weight_ptr, shift_ptr, shift_s, tx_ptr, tx_b, tx_n, tx_h,
    tweight_ptr, tbias_ptr, tshift_ptr, tshift_s, freq_ptr, turn, ty_ptr, eps,
    sample, row, row_out, head, is_row, H: tl.constexpr, D: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, T: tl.constexpr, HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    ta, tb = _load_heads(
        tx_ptr, tx_b, tx_n, tx_h, tshift_ptr, tshift_s, sample, row, head, is_row, D, A, B, ALIGN
    )
    if weight_ptr is not None:
        xa, xb = _load_heads(
            x_ptr, x_b, x_n, x_h, shift_ptr, shift_s, sample, row, head, is_row, D, A, B, ALIGN
        )
        xa, xb, rstd = normalise(xa, xb, eps, D, A, B)
        wa, wb = load_row(weight_ptr, 0, 0, ALIGN, D, A, B)
        ta, tb = normalise_linear(xa, xb, rstd, ta, tb, D)
        ta, tb = ta * wa, tb * wb
        if tweight_ptr is not None:
            twa, twb = load_row(tweight_ptr, 0, 0, ALIGN, D, A, B)
            ta, tb = ta + xa * twa, tb + xb * twb
        if tbias_ptr is not None:
            tba, tbb = load_row(tbias_ptr, 0, 0, ALIGN, D, A, B)
            ta, tb = ta + tba, tb + tbb
    ta, tb = rotate(ta, tb, turn, 1.0, freq_ptr, T, HB, A, B)
    store_rows(ty_ptr, row_out * H + head, is_row, ta, tb, D, A, B)


@kernel
def _jvp_kernel(
    cu_ptr, length, tiles, rows_per_program, q_ptr, q_b, q_n, q_h, k_ptr, k_b, k_n, k_h,
    q_weight_ptr, k_weight_ptr, q_shift_ptr, q_shift_s, k_shift_ptr, k_shift_s,
    tq_ptr, tq_b, tq_n, tq_h, tk_ptr, tk_b, tk_n, tk_h,
    tq_weight_ptr, tq_bias_ptr, tk_weight_ptr, tk_bias_ptr,
    tq_shift_ptr, tq_shift_s, tk_shift_ptr, tk_shift_s,
    position_ptr, position_b, divisor, divisors_ptr, divisors_s, freq_ptr,
    tq_out_ptr, tk_out_ptr, eps, H: tl.constexpr, D: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, T: tl.constexpr, HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    n = tile * T + tl.arange(0, T)
    turn = axial_turn(
        freq_ptr, position_ptr, position_b, divisor, divisors_ptr, divisors_s,
        sample, first, n, n < span, D, A, B, ALIGN,
    )  # fmt: skip
    token, head = tile * T + tl.arange(0, T * HB) // HB, tl.arange(0, T * HB) % HB
    row, row_out, is_row = first + token, first_out + token, token < span
    for begin in range(0, H, HB):
        _jvp_heads(
            q_ptr, q_b, q_n, q_h, q_weight_ptr, q_shift_ptr, q_shift_s, tq_ptr, tq_b, tq_n, tq_h,
            tq_weight_ptr, tq_bias_ptr, tq_shift_ptr, tq_shift_s, freq_ptr, turn, tq_out_ptr, eps,
            sample, row, row_out, begin + head, is_row, H, D, A, B, T, HB, ALIGN,
        )  # fmt: skip
        if k_ptr is not None:
            _jvp_heads(
                k_ptr, k_b, k_n, k_h, k_weight_ptr, k_shift_ptr, k_shift_s,
                tk_ptr, tk_b, tk_n, tk_h, tk_weight_ptr, tk_bias_ptr, tk_shift_ptr, tk_shift_s,
                freq_ptr, turn, tk_out_ptr, eps,
                sample, row, row_out, begin + head, is_row, H, D, A, B, T, HB, ALIGN,
            )  # fmt: skip


@functools.cache
def _cached_frequencies(head_dim: int, device: torch.device):
    freq = reference.frequencies(head_dim, device)
    if device.type == "cuda":  # other streams will read it
        torch.cuda.current_stream(device).synchronize()
    return freq


def _frequencies(head_dim: int, device: torch.device):
    """The reference's own table, so that angles agree bit for bit; made once."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return reference.frequencies(head_dim, device)
    return _cached_frequencies(head_dim, device)


def _plan(kernel_name, x, cu, max_length):
    """The plan and the constants of a kernel over tiles of tokens × heads."""
    elements, num_warps = tuned(f"qk_norm_rope.{kernel_name}", x.device)
    H, D = x.shape[-2:]
    A, B = pieces(D)
    rows = 2 ** min(6, max(0, (elements // (A + B)).bit_length() - 1))
    HB = min(H & -H, 16, rows)  # the heads of a tile: a power of two that divides H
    T = rows // HB
    constants = dict(H=H, D=D, A=A, B=B, T=T, HB=HB, num_warps=num_warps)
    return Plan(x, cu, max_length, T), constants


def _places(positions, divisor, divisors, head_dim, device):
    """The kernels' arguments from position_ptr to freq_ptr."""
    shared = positions is None or positions.ndim == 2
    freq = None
    if positions is not None or divisors is not None or divisor:
        freq = _frequencies(head_dim, device)
    positions = None if positions is None else positions.contiguous()
    position_b = 0 if shared else positions.stride(0)
    divisors = RowView(divisors, 0 if divisors is None else divisors.stride(0))
    return positions, position_b, divisor, divisors, freq


def forward(
    q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift,
    positions, divisor, divisors, eps, cu, max_length,
):  # fmt: skip
    """(q', k'), an empty tensor for k' if there is no k."""
    q_out = q.new_empty(q.shape)
    k_out = q.new_empty(0) if k is None else k.new_empty(q.shape)
    plan, constants = _plan("forward", q, cu, max_length)
    plan.launch(
        _forward_kernel,
        *(head_view(x, cu is not None) for x in (q, k)),
        *map(_dense, (q_weight, q_bias, k_weight, k_bias)),
        *map(row_view, (q_shift, k_shift)),
        *_places(positions, divisor, divisors, q.shape[-1], q.device),
        q_out, k_out, eps, **constants,
    )  # fmt: skip
    return q_out, k_out


def _dense(row):
    return None if row is None else row.contiguous()


def backward(
    dq_out, dk_out, q, k, q_weight, k_weight, q_shift, k_shift,
    positions, divisor, divisors, eps, cu, max_length,
):  # fmt: skip
    """(dq, dk, shifts, affine): shifts is float32 (2, samples, heads·head_dim) for q and k,
    affine float32 (4, head_dim) for q's weight and bias and k's. What nobody asked for is empty
    or unset."""
    dq = q.new_empty(0 if dq_out is None else q.shape)
    dk = q.new_empty(0) if dk_out is None else k.new_empty(k.shape)
    sums = _launch_backward(
        dq_out, dk_out, q, k, q_weight, k_weight, q_shift, k_shift,
        positions, divisor, divisors, eps, cu, max_length,
        None if dq_out is None else dq, None if dk_out is None else dk,
    )  # fmt: skip
    return dq, dk, *sums


def backward_packed(
    dq_out, dk_out, dv, qkv, q_weight, k_weight, q_shift, k_shift,
    positions, divisor, divisors, eps, cu, max_length,
):  # fmt: skip
    """(dqkv, shifts, affine), with all three gradients in one buffer of qkv's shape."""
    dqkv = qkv.new_empty(qkv.shape)
    slots = dqkv.unbind(-3)
    q, k, _ = qkv.unbind(-3)
    sums = _launch_backward(
        dq_out, dk_out, q, k, q_weight, k_weight, q_shift, k_shift,
        positions, divisor, divisors, eps, cu, max_length, *slots[:2],
    )  # fmt: skip
    for slot, gradient in zip(slots, (dq_out, dk_out, dv), strict=True):
        if gradient is None:
            slot.zero_()
    if dv is not None:
        slots[2].copy_(dv)
    return dqkv, *sums


def _launch_backward(
    dq_out, dk_out, q, k, q_weight, k_weight, q_shift, k_shift,
    positions, divisor, divisors, eps, cu, max_length, dq, dk,
):  # fmt: skip
    """Fills dq and dk; returns (shifts, affine)."""
    H, D = q.shape[-2:]
    plan, constants = _plan("backward", q, cu, max_length)
    plan.spread()
    columns, programs = H // constants["HB"], plan.samples * plan.tiles
    make = functools.partial(
        torch.zeros if plan.is_empty else torch.empty, dtype=torch.float32, device=q.device
    )
    is_shifted = q_shift is not None or k_shift is not None
    is_normed = q_weight is not None or k_weight is not None
    shifts = make((2, plan.samples, plan.tiles, H * D) if is_shifted else (2, 0, 0, H * D))
    affine = make((4, programs * columns if is_normed else 0, D))
    is_packed = cu is not None
    plan.launch(
        _backward_kernel,
        *(head_view(x, is_packed) for x in (dq_out, dk_out, q, k)),
        *map(_dense, (q_weight, k_weight)),
        *map(row_view, (q_shift, k_shift)),
        *_places(positions, divisor, divisors, D, q.device),
        *(head_view(x, is_packed) for x in (dq, dk)),
        shifts[0], shifts[1], affine[:2], affine[2:], programs, eps, columns=columns, **constants,
    )  # fmt: skip
    return shifts.sum(2), affine.sum(1)


def jvp(
    q, k, q_weight, k_weight, q_shift, k_shift, tq, tk, tq_weight, tq_bias, tk_weight, tk_bias,
    tq_shift, tk_shift, positions, divisor, divisors, eps, cu, max_length,
):  # fmt: skip
    """Tangents of (q', k'); a tangent that is None is zero."""
    tq_out = q.new_empty(q.shape)
    tk_out = q.new_empty(0) if k is None else k.new_empty(k.shape)
    plan, constants = _plan("jvp", q, cu, max_length)
    plan.launch(
        _jvp_kernel,
        *(head_view(x, cu is not None) for x in (q, k)),
        *map(_dense, (q_weight, k_weight)),
        *map(row_view, (q_shift, k_shift)),
        *(head_view(x, cu is not None) for x in (tq, tk)),
        *map(_dense, (tq_weight, tq_bias, tk_weight, tk_bias)),
        *map(row_view, (tq_shift, tk_shift)),
        *_places(positions, divisor, divisors, q.shape[-1], q.device),
        tq_out, tk_out, eps, **constants,
    )  # fmt: skip
    return tq_out, tk_out
