"""Triton kernels of the gated residual, LayerNorm and modulation, in any combination.

Per token, with conditioning rows that are constant over a sample:

    x' = x + gate·(branch + bias)      left out when there is no branch
    y  = LN(x')·(1 + scale) + shift    left out when there is no scale

LayerNorm statistics are recomputed in backward and tangent: the row is in registers anyway, so
saving them would cost bytes and recomputing costs none. Gradients of the conditioning rows are
summed over a program's tokens in registers and over programs by torch.sum.

In the kernels xa, xb are the two pieces of a row (see rows.py), g gate, r branch + bias,
d gradients, t tangents.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch.calls import Made, Out, like
from ..launch.grid import kernel, launch
from ..launch.rows import (
    load_row,
    load_rows,
    locate,
    normalise,
    normalise_linear,
    only_channels,
    pieces,
    store_row,
    store_rows,
    sum_rows,
    tile_rows,
)
from ..launch.shares import samples_and_length, token_grid, tokens_to_reduce
from ..launch.tuning import tuned
from ..launch.views import In, view_cond, view_tokens


@kernel
def _ada_layer_norm_forward_kernel(
    cu_ptr, length, tiles,
    x_ptr, x_b, x_n, branch_ptr, branch_b, branch_n, gate_ptr, gate_s, bias_ptr, bias_s,
    shift_ptr, shift_s, scale_ptr, scale_s, out_ptr, y_ptr, eps,
    C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    n = tile * ROWS + tl.arange(0, ROWS)
    is_row = n < span
    row, row_out = first + n, first_out + n

    xa, xb = load_rows(x_ptr, sample, x_b, row, x_n, is_row, ALIGN, C, A, B)
    if branch_ptr is not None:
        ra, rb = load_rows(branch_ptr, sample, branch_b, row, branch_n, is_row, ALIGN, C, A, B)
        ga, gb = load_row(gate_ptr, sample, gate_s, ALIGN, C, A, B)
        bias_a, bias_b = load_row(bias_ptr, sample, bias_s, ALIGN, C, A, B)
        xa, xb = xa + ga * (ra + bias_a), xb + gb * (rb + bias_b)
        store_rows(out_ptr, row_out, is_row, xa, xb, C, A, B)
    if scale_ptr is not None:
        xa, xb, _ = normalise(xa, xb, eps, C, A, B)
        scale_a, scale_b = load_row(scale_ptr, sample, scale_s, ALIGN, C, A, B)
        shift_a, shift_b = load_row(shift_ptr, sample, shift_s, ALIGN, C, A, B)
        ya, yb = xa * (1 + scale_a) + shift_a, xb * (1 + scale_b) + shift_b
        store_rows(y_ptr, row_out, is_row, ya, yb, C, A, B)


@kernel
def _ada_layer_norm_backward_kernel(
    cu_ptr, length, tiles, tokens_per_program,
    dout_ptr, dout_b, dout_n, dy_ptr, dy_b, dy_n, x_ptr, x_b, x_n, branch_ptr, branch_b, branch_n,
    gate_ptr, gate_s, bias_ptr, bias_s, scale_ptr, scale_s,
    dx_ptr, dbranch_ptr, partial_ptr, partial_step, eps,
    C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    start = tile * tokens_per_program
    stop = min(start + tokens_per_program, span)
    scale_a, scale_b = load_row(scale_ptr, sample, scale_s, ALIGN, C, A, B)
    ga, gb = load_row(gate_ptr, sample, gate_s, ALIGN, C, A, B)
    bias_a, bias_b = load_row(bias_ptr, sample, bias_s, ALIGN, C, A, B)
    dshift_a, dshift_b = tl.zeros((A,), tl.float32), tl.zeros((B,), tl.float32)
    dscale_a, dscale_b = tl.zeros((A,), tl.float32), tl.zeros((B,), tl.float32)
    dgate_a, dgate_b = tl.zeros((A,), tl.float32), tl.zeros((B,), tl.float32)
    dbias_a, dbias_b = tl.zeros((A,), tl.float32), tl.zeros((B,), tl.float32)
    for begin in range(start, stop, ROWS):
        n = begin + tl.arange(0, ROWS)
        is_row = n < stop
        row, row_out = first + n, first_out + n
        # all loads before the first use: half the waits, a fifth fewer registers
        ra, rb = load_rows(branch_ptr, sample, branch_b, row, branch_n, is_row, ALIGN, C, A, B)
        if dy_ptr is not None:
            xa, xb = load_rows(x_ptr, sample, x_b, row, x_n, is_row, ALIGN, C, A, B)
            ya, yb = load_rows(dy_ptr, sample, dy_b, row, dy_n, is_row, ALIGN, C, A, B)
        da, db = load_rows(dout_ptr, sample, dout_b, row, dout_n, is_row, ALIGN, C, A, B)
        ra, rb = ra + bias_a, rb + bias_b
        if dy_ptr is not None:
            xa, xb, rstd = normalise(xa + ga * ra, xb + gb * rb, eps, C, A, B)
            sum_a, sum_b = sum_rows(is_row, ya, yb)
            dshift_a, dshift_b = dshift_a + sum_a, dshift_b + sum_b
            sum_a, sum_b = sum_rows(is_row, ya * xa, yb * xb)
            dscale_a, dscale_b = dscale_a + sum_a, dscale_b + sum_b
            ya, yb = ya * (1 + scale_a), yb * (1 + scale_b)
            ya, yb = normalise_linear(xa, xb, rstd, ya, yb, C)
            da, db = da + ya, db + yb
        store_rows(dx_ptr, row_out, is_row, da, db, C, A, B)
        if branch_ptr is not None:
            store_rows(dbranch_ptr, row_out, is_row, da * ga, db * gb, C, A, B)
            sum_a, sum_b = sum_rows(is_row, da * ra, db * rb)
            dgate_a, dgate_b = dgate_a + sum_a, dgate_b + sum_b
            if bias_ptr is not None:
                sum_a, sum_b = sum_rows(is_row, da * ga, db * gb)
                dbias_a, dbias_b = dbias_a + sum_a, dbias_b + sum_b

    partial_ptr += tl.program_id(0).to(tl.int64) * C  # (4, programs, C), the four in this order:
    step = tl.cast(partial_step, tl.int64) * C
    if dy_ptr is not None:
        store_row(partial_ptr, dshift_a, dshift_b, C, A, B)
        store_row(partial_ptr + step, dscale_a, dscale_b, C, A, B)
    if branch_ptr is not None:
        store_row(partial_ptr + 2 * step, dgate_a, dgate_b, C, A, B)
        if bias_ptr is not None:
            store_row(partial_ptr + 3 * step, dbias_a, dbias_b, C, A, B)


@kernel
def _ada_layer_norm_jvp_kernel(
    cu_ptr, length, tiles,
    x_ptr, x_b, x_n, branch_ptr, branch_b, branch_n, gate_ptr, gate_s, bias_ptr, bias_s,
    scale_ptr, scale_s, tx_ptr, tx_b, tx_n, tbranch_ptr, tbranch_b, tbranch_n,
    tgate_ptr, tgate_s, tbias_ptr, tbias_s, tshift_ptr, tshift_s, tscale_ptr, tscale_s,
    tout_ptr, ty_ptr, eps,
    C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    n = tile * ROWS + tl.arange(0, ROWS)
    is_row = n < span
    row, row_out = first + n, first_out + n

    xa, xb = load_rows(x_ptr, sample, x_b, row, x_n, is_row, ALIGN, C, A, B)
    ta, tb = load_rows(tx_ptr, sample, tx_b, row, tx_n, is_row, ALIGN, C, A, B)
    if branch_ptr is not None:
        ra, rb = load_rows(branch_ptr, sample, branch_b, row, branch_n, is_row, ALIGN, C, A, B)
        va, vb = load_rows(tbranch_ptr, sample, tbranch_b, row, tbranch_n, is_row, ALIGN, C, A, B)
        ga, gb = load_row(gate_ptr, sample, gate_s, ALIGN, C, A, B)
        tga, tgb = load_row(tgate_ptr, sample, tgate_s, ALIGN, C, A, B)
        bias_a, bias_b = load_row(bias_ptr, sample, bias_s, ALIGN, C, A, B)
        tbias_a, tbias_b = load_row(tbias_ptr, sample, tbias_s, ALIGN, C, A, B)
        ra, rb, va, vb = ra + bias_a, rb + bias_b, va + tbias_a, vb + tbias_b
        xa, xb = xa + ga * ra, xb + gb * rb
        ta, tb = ta + tga * ra + ga * va, tb + tgb * rb + gb * vb
        store_rows(tout_ptr, row_out, is_row, ta, tb, C, A, B)
    if scale_ptr is not None:
        xa, xb, rstd = normalise(xa, xb, eps, C, A, B)
        ta, tb = only_channels(ta, tb, C, A, B)
        ta, tb = normalise_linear(xa, xb, rstd, ta, tb, C)
        scale_a, scale_b = load_row(scale_ptr, sample, scale_s, ALIGN, C, A, B)
        tscale_a, tscale_b = load_row(tscale_ptr, sample, tscale_s, ALIGN, C, A, B)
        tshift_a, tshift_b = load_row(tshift_ptr, sample, tshift_s, ALIGN, C, A, B)
        ta = ta * (1 + scale_a) + xa * tscale_a + tshift_a
        tb = tb * (1 + scale_b) + xb * tscale_b + tshift_b
        store_rows(ty_ptr, row_out, is_row, ta, tb, C, A, B)


def _tile(direction: str, x: Tensor) -> dict[str, int]:
    """The constants of a kernel over rows of x."""
    elements, num_warps = tuned(f"ada_layer_norm.{direction}", x.device)
    C = x.shape[-1]
    A, B = pieces(C)
    if A + B > 1152:  # tuned for rows up to there: more channels, more warps to hold them
        num_warps = min(16, num_warps * triton.next_power_of_2(triton.cdiv(A + B, 1152)))
    return dict(C=C, A=A, B=B, ROWS=tile_rows(C, elements), num_warps=num_warps)


def forward(*args):
    """(x', y), either of them an empty tensor where the op does not make it."""
    x, branch, _, _, _, scale, eps, cu, max_length = args
    tile = _tile("forward", x)
    programs, length, tiles = token_grid(x, cu, max_length, tile["ROWS"])
    return launch(
        _ada_layer_norm_forward_kernel, (programs,),
        (In(7), length, tiles, *view_tokens(args, 0, 1, is_packed=cu is not None),
         *view_cond(args, 2, 3, 4, 5), Out(0), Out(1), eps),
        (like(x, branch), like(x, scale)), args, **tile,
    )  # fmt: skip


def backward(*args):
    """(dx, dbranch, sums): float32 sums (4, samples, C) for shift, scale, gate and bias.

    x' is made again from x and branch, which costs no more bytes than reading it and loses nothing
    to its rounding. Gradients nobody has are empty or unset.
    """
    _, _, x, branch, *_, eps, cu, max_length = args
    tile = _tile("backward", x)
    tokens = tokens_to_reduce(x, cu, max_length, tile["num_warps"], tile["ROWS"])
    programs, length, tiles = token_grid(x, cu, max_length, tokens)
    samples, _ = samples_and_length(x, cu, max_length)
    return launch(
        _ada_layer_norm_backward_kernel, (programs,),
        (In(8), length, tiles, tokens, *view_tokens(args, 0, 1, 2, 3, is_packed=cu is not None),
         *view_cond(args, 4, 5, 6), Out(0), Out(1), Out(2), programs, eps),
        (like(x), like(branch), Made((4, samples, tiles, x.shape[-1]), torch.float32)), args,
        finish=lambda dx, dbranch, partial: (dx, dbranch, partial.sum(2)), **tile,
    )  # fmt: skip


def jvp(*args):
    """Tangents of (x', y); a tangent that is None is zero."""
    x, branch, _, _, _, scale, eps, cu, max_length = args[:9]
    tile, is_packed = _tile("jvp", x), cu is not None
    programs, length, tiles = token_grid(x, cu, max_length, tile["ROWS"])
    return launch(
        _ada_layer_norm_jvp_kernel, (programs,),
        (In(7), length, tiles,
         *view_tokens(args, 0, 1, is_packed=is_packed), *view_cond(args, 2, 3, 5),
         *view_tokens(args, 9, 10, is_packed=is_packed), *view_cond(args, 11, 12, 13, 14),
         Out(0), Out(1), eps),
        (like(x, branch), like(x, scale)), args, **tile,
    )  # fmt: skip
