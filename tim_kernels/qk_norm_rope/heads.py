"""Triton helpers on heads of tokens: what forward, backward and tangent do to q or to k.

A view of heads is (pointer, batch, token and head stride), a shift (pointer, sample stride), a norm
(weight, bias, eps). A tile is T tokens × HB heads, flattened to R rows, and `at` says where it
is: its sample, and per row the token in a view and in a contiguous output, the head, and whether
the token exists.
"""

import triton
import triton.language as tl

from ..launch.rows import load_row, normalise, normalise_linear, store_row, store_rows
from .rotation import axial_turn, rotate


@triton.jit
def _load(ptr, offset, is_row, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Rows that start at `offset` (R,) as float32 pieces."""
    start = ptr + offset[:, None]
    column_a, column_b = tl.arange(0, A)[None, :], A + tl.arange(0, B)[None, :]
    a = tl.load(start + column_a, mask=is_row[:, None] & (column_a < D), other=0.0)
    b = tl.load(start + column_b, mask=is_row[:, None] & (column_b < D), other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _load_heads(
    view, shift, at, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr
):
    """x + shift, float32 pieces (R, A) and (R, B); a tensor that is None is zero."""
    x_ptr, x_b, x_n, x_h = view
    shift_ptr, shift_s = shift
    sample, row, _, head, is_row = at
    head = head.to(tl.int64)
    if x_ptr is None:
        zero = tl.zeros_like(head).to(tl.float32)[:, None]
        xa, xb = zero + tl.zeros((1, A), tl.float32), zero + tl.zeros((1, B), tl.float32)
    else:
        xa, xb = _load(x_ptr, (sample * x_b + row * x_n + head * x_h) * ALIGN, is_row, D, A, B)
    if shift_ptr is not None:
        sa, sb = _load(shift_ptr, sample * shift_s * ALIGN + head * D, is_row, D, A, B)
        xa, xb = xa + sa, xb + sb
    return xa, xb


@triton.jit
def _store_heads(
    view, at, a, b, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr
):
    x_ptr, x_b, x_n, x_h = view
    sample, row, _, head, is_row = at
    start = x_ptr + ((sample * x_b + row * x_n + head.to(tl.int64) * x_h) * ALIGN)[:, None]
    column_a, column_b = tl.arange(0, A)[None, :], A + tl.arange(0, B)[None, :]
    tl.store(start + column_a, a, mask=is_row[:, None] & (column_a < D))
    tl.store(start + column_b, b, mask=is_row[:, None] & (column_b < D))


@triton.jit
def locate_tokens(
    first, first_out, begin, stop, T: tl.constexpr, HB: tl.constexpr
):  # fmt: skip
    """The T tokens of a sample from `begin` on: n, (T,), and (row, row_out, is_row), each (R,)."""
    token = begin + tl.arange(0, T * HB) // HB
    return begin + tl.arange(0, T), first + token, first_out + token, token < stop


@triton.jit
def forward_heads(
    x, shift, norm, turn, y_ptr, at, H: tl.constexpr, D: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, T: tl.constexpr, HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    weight_ptr, bias_ptr, eps = norm
    _, _, row_out, head, is_row = at
    xa, xb = _load_heads(x, shift, at, D, A, B, ALIGN)
    if weight_ptr is not None:
        wa, wb = load_row(weight_ptr, 0, 0, ALIGN, D, A, B)
        ba, bb = load_row(bias_ptr, 0, 0, ALIGN, D, A, B)
        xa, xb, _ = normalise(xa, xb, eps, D, A, B)
        xa, xb = xa * wa + ba, xb * wb + bb
    xa, xb = rotate(xa, xb, turn, 1.0, T, HB, A, B)
    store_rows(y_ptr, row_out * H + head, is_row, xa, xb, D, A, B)


@triton.jit
def jvp_heads(
    x, shift, norm, tx, tshift, tnorm, turn, ty_ptr, at, H: tl.constexpr, D: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, T: tl.constexpr, HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    weight_ptr, eps = norm
    tweight_ptr, tbias_ptr = tnorm
    _, _, row_out, head, is_row = at
    ta, tb = _load_heads(tx, tshift, at, D, A, B, ALIGN)
    if weight_ptr is not None:
        xa, xb = _load_heads(x, shift, at, D, A, B, ALIGN)
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
    ta, tb = rotate(ta, tb, turn, 1.0, T, HB, A, B)
    store_rows(ty_ptr, row_out * H + head, is_row, ta, tb, D, A, B)


@triton.jit
def backward_heads(
    dy, x, shift, norm, positions, dx, dshift_ptr, affine_ptr, step, tokens,
    H: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
    HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dx of the tokens from `start` to `stop`, and this program's part of dshift (programs, H, D)
    and of dweight, dbias (2, programs·columns, D)."""
    weight_ptr, eps = norm
    shift_ptr, _ = shift
    _, _, _, _, _, freq_ptr = positions
    sample, first, first_out, start, stop = tokens
    program = tl.program_id(0).to(tl.int64)
    column = 0 if H == HB else tl.program_id(1)
    head = column * HB + tl.arange(0, T * HB) % HB
    za, zb = tl.zeros((T * HB, A), tl.float32), tl.zeros((T * HB, B), tl.float32)
    dshift_a, dshift_b, dweight_a, dweight_b, dbias_a, dbias_b = za, zb, za, zb, za, zb
    if weight_ptr is not None:
        wa, wb = load_row(weight_ptr, 0, 0, ALIGN, D, A, B)
    for begin in range(start, stop, T):
        n, row, row_out, is_row = locate_tokens(first, first_out, begin, stop, T, HB)
        if freq_ptr is None:
            turn = None
        else:
            turn = axial_turn(positions, sample, first, n, n < stop, D, A, B, ALIGN)
        at = sample, row, row_out, head, is_row
        ga, gb = _load_heads(dy, (None, 0), at, D, A, B, ALIGN)
        if weight_ptr is not None:  # all loads before the first use
            xa, xb = _load_heads(x, shift, at, D, A, B, ALIGN)
        ga, gb = rotate(ga, gb, turn, -1.0, T, HB, A, B)
        if weight_ptr is not None:
            xa, xb, rstd = normalise(xa, xb, eps, D, A, B, APART=A != B)
            dbias_a, dbias_b = dbias_a + ga, dbias_b + gb
            dweight_a, dweight_b = dweight_a + ga * xa, dweight_b + gb * xb
            ga, gb = normalise_linear(xa, xb, rstd, ga * wa, gb * wb, D, APART=A != B)
        if shift_ptr is not None:
            dshift_a, dshift_b = dshift_a + ga, dshift_b + gb
        _store_heads(dx, at, ga, gb, D, A, B, ALIGN)

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
