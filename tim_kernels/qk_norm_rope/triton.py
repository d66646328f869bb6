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
import triton.language as tl

from ..launch.grid import Plan, kernel
from ..launch.rows import locate, pieces
from ..launch.tuning import tuned
from ..launch.views import RowView, head_view, row_view
from .frequencies import frequencies
from .heads import backward_heads, forward_heads, jvp_heads, locate_tokens
from .rotation import axial_turn


@kernel
def _forward_kernel(
    cu_ptr, length, tiles, rows_per_program, q_ptr, q_b, q_n, q_h, k_ptr, k_b, k_n, k_h,
    q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,
    q_shift_ptr, q_shift_s, k_shift_ptr, k_shift_s,
    position_ptr, position_b, divisor, divisors_ptr, divisors_s, freq_ptr,
    q_out_ptr, k_out_ptr, eps, H: tl.constexpr, D: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, T: tl.constexpr, HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    places = position_ptr, position_b, divisor, divisors_ptr, divisors_s, freq_ptr
    q, q_shift = (q_ptr, q_b, q_n, q_h), (q_shift_ptr, q_shift_s)
    k, k_shift = (k_ptr, k_b, k_n, k_h), (k_shift_ptr, k_shift_s)
    q_norm, k_norm = (q_weight_ptr, q_bias_ptr, eps), (k_weight_ptr, k_bias_ptr, eps)
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    n, row, row_out, is_row = locate_tokens(first, first_out, tile * T, span, T, HB)
    if freq_ptr is None:
        turn = None
    else:
        turn = axial_turn(places, sample, first, n, n < span, D, A, B, ALIGN)
    for begin in range(0, H, HB):
        at = sample, row, row_out, begin + tl.arange(0, T * HB) % HB, is_row
        forward_heads(q, q_shift, q_norm, turn, q_out_ptr, at, H, D, A, B, T, HB, ALIGN)
        if k_ptr is not None:
            forward_heads(k, k_shift, k_norm, turn, k_out_ptr, at, H, D, A, B, T, HB, ALIGN)


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
    places = position_ptr, position_b, divisor, divisors_ptr, divisors_s, freq_ptr
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    stop = min((tile + 1) * rows_per_program, span)
    tokens = sample, first, first_out, tile * rows_per_program, stop
    if dq_out_ptr is not None:
        backward_heads(
            (dq_out_ptr, dq_out_b, dq_out_n, dq_out_h), (q_ptr, q_b, q_n, q_h),
            (q_shift_ptr, q_shift_s), (q_weight_ptr, eps), places, (dq_ptr, dq_b, dq_n, dq_h),
            q_dshift_ptr, q_affine_ptr, step, tokens, H, D, A, B, T, HB, ALIGN,
        )  # fmt: skip
    if dk_out_ptr is not None:
        backward_heads(
            (dk_out_ptr, dk_out_b, dk_out_n, dk_out_h), (k_ptr, k_b, k_n, k_h),
            (k_shift_ptr, k_shift_s), (k_weight_ptr, eps), places, (dk_ptr, dk_b, dk_n, dk_h),
            k_dshift_ptr, k_affine_ptr, step, tokens, H, D, A, B, T, HB, ALIGN,
        )  # fmt: skip


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
    places = position_ptr, position_b, divisor, divisors_ptr, divisors_s, freq_ptr
    q, q_shift, q_norm = (q_ptr, q_b, q_n, q_h), (q_shift_ptr, q_shift_s), (q_weight_ptr, eps)
    k, k_shift, k_norm = (k_ptr, k_b, k_n, k_h), (k_shift_ptr, k_shift_s), (k_weight_ptr, eps)
    tq, tq_shift = (tq_ptr, tq_b, tq_n, tq_h), (tq_shift_ptr, tq_shift_s)
    tk, tk_shift = (tk_ptr, tk_b, tk_n, tk_h), (tk_shift_ptr, tk_shift_s)
    tq_norm, tk_norm = (tq_weight_ptr, tq_bias_ptr), (tk_weight_ptr, tk_bias_ptr)
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    n, row, row_out, is_row = locate_tokens(first, first_out, tile * T, span, T, HB)
    if freq_ptr is None:
        turn = None
    else:
        turn = axial_turn(places, sample, first, n, n < span, D, A, B, ALIGN)
    for begin in range(0, H, HB):
        at = sample, row, row_out, begin + tl.arange(0, T * HB) % HB, is_row
        jvp_heads(
            q, q_shift, q_norm, tq, tq_shift, tq_norm, turn, tq_out_ptr, at,
            H, D, A, B, T, HB, ALIGN,
        )  # fmt: skip
        if k_ptr is not None:
            jvp_heads(
                k, k_shift, k_norm, tk, tk_shift, tk_norm, turn, tk_out_ptr, at,
                H, D, A, B, T, HB, ALIGN,
            )  # fmt: skip


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
        freq = frequencies(head_dim, device)
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
    positions, divisor, divisors, eps, cu, max_length, dq, dk,
):  # fmt: skip
    """Fill those of dq and dk that are not None; returns (shifts, affine), float32: shifts
    (2, samples, heads·head_dim) for q and k, affine (4, head_dim) for q's weight and bias and k's.
    What nobody asked for is empty or unset."""
    H, D = q.shape[-2:]
    plan, constants = _plan("backward", q, cu, max_length)
    columns = H // constants["HB"]
    plan.spread(constants["num_warps"], columns)
    programs = plan.samples * plan.tiles
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
