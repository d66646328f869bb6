"""Triton helpers on heads of tokens: what forward, backward and tangent do to q or to k.

A view of heads is (pointer, batch, token and head stride), a shift (pointer, sample stride), a norm
(weight, bias, eps). A tile is T tokens × HB heads, flattened to R rows in the chunks of lanes.py,
and `at` says where it is: its sample, the first token in a view and in a contiguous output, and per
row the token from there on, the head, and whether the token exists.
"""

import triton
import triton.language as tl

from ..launch.lanes import (
    load_chunks,
    normalise_chunks,
    normalise_chunks_linear,
    store_chunks,
    store_vector,
)
from .rotation import axial_turn, load_frequencies, rotate

STAGES = tl.constexpr(3)  # of backward's loop over tokens: two trips are on their way


@triton.jit
def _offset(view, at, ALIGN: tl.constexpr):
    """Of the first token's elements, and of rows (R,) from there."""
    _, x_b, x_n, x_h = view
    sample, n, _, token, head, _ = at
    start = (sample * x_b + n * x_n) * ALIGN
    return start, (token.to(tl.int64) * x_n + head.to(tl.int64) * x_h) * ALIGN


@triton.jit
def load_heads(
    view, at, D: tl.constexpr, K: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    if view[0] is None:
        return
    else:
        start, offset = _offset(view, at, ALIGN)
        return load_chunks(view[0] + start, offset, at[5], D, K, P, B)


@triton.jit
def load_shift(
    shift, at, D: tl.constexpr, K: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    shift_ptr, shift_s = shift
    if shift_ptr is None:
        return
    else:
        return load_chunks(shift_ptr + at[0] * shift_s * ALIGN, at[4] * D, at[5], D, K, P, B)


@triton.jit
def load_weight(
    ptr, at, D: tl.constexpr, K: tl.constexpr, P: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """(D,) for each row, so that threads have it where they have the rows."""
    if ptr is None:
        return
    else:
        return load_chunks(ptr, at[4] * 0, at[5], D, K, P, B)


@triton.jit
def _float(x):
    return x[0].to(tl.float32), x[1].to(tl.float32)


@triton.jit
def _add(x, y):
    """Pairs of pieces in float32; None is zero."""
    if y is None:
        return _float(x)
    elif x is None:
        return _float(y)
    else:
        xa, xb = _float(x)
        ya, yb = _float(y)
        return xa + ya, xb + yb


@triton.jit
def _store(
    y_ptr, at, a, b, H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """To contiguous (…, H, D)."""
    _, _, n_out, token, head, is_row = at
    store_chunks(y_ptr + n_out * (H * D), (token * H + head) * D, is_row, a, b, D, K, P, B)


@triton.jit
def forward_heads(
    x, shift, weight, bias, eps, turn, y_ptr, at, H: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    P: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    xa, xb = _add(x, shift)
    if weight is not None:
        xa, xb, _ = normalise_chunks(xa, xb, eps, D, LANES)
        wa, wb = _float(weight)
        xa, xb = _add((xa * wa, xb * wb), bias)
    xa, xb = rotate(xa, xb, turn, 1.0, T)
    _store(y_ptr, at, xa, xb, H, D, K, P, B)


@triton.jit
def jvp_heads(
    x, shift, weight, tx, tshift, tweight, tbias, eps, turn, ty_ptr, at, H: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, P: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = at[4].shape[0]
    if tx is None and tshift is None:
        ta, tb = tl.zeros((K, R, P), tl.float32), tl.zeros((R, B), tl.float32)
    else:
        ta, tb = _add(tx, tshift)
    if weight is not None:
        xa, xb = _add(x, shift)
        xa, xb, rstd = normalise_chunks(xa, xb, eps, D, LANES)
        ta, tb = normalise_chunks_linear(xa, xb, rstd, ta, tb, D, LANES)
        wa, wb = _float(weight)
        ta, tb = ta * wa, tb * wb
        if tweight is not None:
            wa, wb = _float(tweight)
            ta, tb = ta + xa * wa, tb + xb * wb
        ta, tb = _add((ta, tb), tbias)
    ta, tb = rotate(ta, tb, turn, 1.0, T)
    _store(ty_ptr, at, ta, tb, H, D, K, P, B)


@triton.jit
def backward_heads(
    dy, x, shift, norm, positions, dx, dshift_ptr, affine_ptr, step, tokens,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
    LANES: tl.constexpr, T: tl.constexpr, HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dx of the tokens from `start` to `stop`, and this program's part of dshift (programs, H, D)
    and of dweight, dbias (2, programs·columns, D)."""
    weight_ptr, eps = norm
    shift_ptr, _ = shift
    _, _, _, _, _, freq_ptr = positions
    sample, first, first_out, start, stop = tokens
    program = tl.program_id(0).to(tl.int64)
    column = 0 if H == HB else tl.program_id(1)
    R: tl.constexpr = T * HB
    token, head = tl.arange(0, R) // HB, column * HB + tl.arange(0, R) % HB
    za, zb = tl.zeros((K, R, P), tl.float32), tl.zeros((R, B), tl.float32)
    dshift_a, dshift_b, dweight_a, dweight_b, dbias_a, dbias_b = za, zb, za, zb, za, zb
    frequencies = load_frequencies(freq_ptr, D, K, P, B)
    for begin in tl.range(start, stop, T, num_stages=STAGES):
        n = begin + tl.arange(0, T)
        is_row = token >= 0 if T == 1 else begin + token < stop
        at = sample, first + begin, first_out + begin, token, head, is_row
        gradient = load_heads(dy, at, D, K, P, B, ALIGN)
        if weight_ptr is not None:
            rows = load_heads(x, at, D, K, P, B, ALIGN)
            xa, xb = _add(rows, load_shift(shift, at, D, K, P, B, ALIGN))
            weight = load_weight(weight_ptr, at, D, K, P, B)
        turn = axial_turn(frequencies, positions, sample, first, n, n < stop)
        ga, gb = _float(gradient)
        ga, gb = rotate(ga, gb, turn, -1.0, T)
        if weight_ptr is not None:
            xa, xb, rstd = normalise_chunks(xa, xb, eps, D, LANES)
            dbias_a, dbias_b = dbias_a + ga, dbias_b + gb
            dweight_a, dweight_b = dweight_a + ga * xa, dweight_b + gb * xb
            wa, wb = _float(weight)
            ga, gb = normalise_chunks_linear(xa, xb, rstd, ga * wa, gb * wb, D, LANES)
        if shift_ptr is not None:
            dshift_a, dshift_b = dshift_a + ga, dshift_b + gb
        start_dx, offset = _offset(dx, at, ALIGN)
        store_chunks(dx[0] + start_dx, offset, at[5], ga, gb, D, K, P, B)

    if shift_ptr is not None:
        dshift_a = tl.sum(tl.reshape(dshift_a, (K, T, HB, P)), 1)
        dshift_b = tl.sum(tl.reshape(dshift_b, (T, HB, B)), 0)
        head = column * HB + tl.arange(0, HB)
        dshift_ptr += program * (H * D)
        store_chunks(dshift_ptr, head * D, head >= 0, dshift_a, dshift_b, D, K, P, B)
    if weight_ptr is not None:
        affine_ptr += (program * (H // HB) + column) * D
        store_vector(affine_ptr, tl.sum(dweight_a, 1), tl.sum(dweight_b, 0), D, K, P, B)
        affine_ptr += tl.cast(step, tl.int64) * (H // HB * D)
        store_vector(affine_ptr, tl.sum(dbias_a, 1), tl.sum(dbias_b, 0), D, K, P, B)
