"""Triton kernels of the gated residual, a norm and modulation, in any combination.

Per token, with x̂ the LayerNorm or the RMSNorm of x':

    x' = x + gate·(branch + bias)                            left out when there is no branch
    y  = (x̂·weight + norm_bias)·(1 + scale) + shift          left out when there is no norm

gate, scale and shift are rows that are constant over a sample, or of each token; what is None is
left out. Statistics are recomputed in backward and tangent: the token is in registers anyway, so
saving them would cost bytes and recomputing costs none. Gradients of rows are summed over a
program's tokens in registers and over programs by torch.sum.

In the kernels xa, xb are the two pieces of a row (see rows.py), g gate, r branch + bias, w weight,
d gradients, t tangents.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch.calls import Made, Out, like
from ..launch.grid import kernel, launch
from ..launch.lanes import (
    chunks,
    load_chunks,
    normalise_chunks,
    normalise_chunks_linear,
    store_chunks,
    store_vector,
    sum_of_rows,
)
from ..launch.rows import (
    load_row,
    load_rows,
    locate,
    normalise,
    normalise_linear,
    only_channels,
    pieces,
    store_rows,
    store_rows_fp8,
    tile_rows,
)
from ..launch.shares import samples_and_length, token_grid, tokens_to_reduce
from ..launch.tuning import has_tensor_memory, tuned
from ..launch.views import In, view_cond, view_modulation, view_tokens, view_vectors
from .forms import is_of_token, sums

COPIES = 96 * 1024  # bytes of shared memory that a program of backward may take


@triton.jit
def _load(
    ptr, sample, stride_s, row, stride_n, is_row, ALIGN: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Conditioning of each token, (ROWS, A) and (ROWS, B), or of the sample, (1, A) and (1, B)."""
    if stride_n is None:
        return load_row(ptr, sample, stride_s, ALIGN, C, A, B)
    else:
        return load_rows(ptr, sample, stride_s, row, stride_n, is_row, ALIGN, C, A, B)


@triton.jit
def _load_vector(ptr, C: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """(C,) as (1, A), (1, B); zeros if ptr is None."""
    return load_row(ptr, 0, 0, 1, C, A, B)


@kernel
def _ada_layer_norm_forward_kernel(
    cu_ptr, length, tiles,
    x_ptr, x_b, x_n, branch_ptr, branch_b, branch_n, gate_ptr, gate_s, gate_n,
    bias_ptr, bias_s, shift_ptr, shift_s, shift_n, scale_ptr, scale_s, scale_n,
    weight_ptr, norm_bias_ptr, out_ptr, y_ptr, fp8_scale_ptr, eps,
    IS_RMS: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    n = tile * ROWS + tl.arange(0, ROWS)
    is_row = n < span
    row, row_out = first + n, first_out + n

    xa, xb = load_rows(x_ptr, sample, x_b, row, x_n, is_row, ALIGN, C, A, B)
    if branch_ptr is not None:
        ra, rb = load_rows(branch_ptr, sample, branch_b, row, branch_n, is_row, ALIGN, C, A, B)
        if gate_ptr is None:
            ga, gb = 1.0, 1.0
        else:
            ga, gb = _load(gate_ptr, sample, gate_s, row, gate_n, is_row, ALIGN, C, A, B)
        bias_a, bias_b = load_row(bias_ptr, sample, bias_s, ALIGN, C, A, B)
        xa, xb = xa + ga * (ra + bias_a), xb + gb * (rb + bias_b)
        store_rows(out_ptr, row_out, is_row, xa, xb, C, A, B)
    if y_ptr is not None:
        xa, xb, _ = normalise(xa, xb, eps, C, A, B, IS_RMS=IS_RMS)
        if weight_ptr is not None:
            wa, wb = _load_vector(weight_ptr, C, A, B)
            xa, xb = xa * wa, xb * wb
        if norm_bias_ptr is not None:
            wa, wb = _load_vector(norm_bias_ptr, C, A, B)
            xa, xb = xa + wa, xb + wb
        scale_a, scale_b = _load(scale_ptr, sample, scale_s, row, scale_n, is_row, ALIGN, C, A, B)
        shift_a, shift_b = _load(shift_ptr, sample, shift_s, row, shift_n, is_row, ALIGN, C, A, B)
        ya, yb = xa * (1 + scale_a) + shift_a, xb * (1 + scale_b) + shift_b
        if fp8_scale_ptr is None:
            store_rows(y_ptr, row_out, is_row, ya, yb, C, A, B)
        else:
            store_rows_fp8(y_ptr, fp8_scale_ptr, row_out, is_row, ya, yb, C, A, B)


@triton.jit
def _load_float(
    ptr, sample, stride_b, row, stride_n, is_row, ALIGN: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rows of a sample's view in the chunks of lanes.py, or its one row for each of them where
    stride_n is None; zeros if ptr is None."""
    R: tl.constexpr = row.shape[0]
    if ptr is None:
        return tl.zeros((K, R, P), tl.float32), tl.zeros((R, B), tl.float32)
    else:
        offset = row * 0 if stride_n is None else row * stride_n * ALIGN
        a, b = load_chunks(ptr + sample * stride_b * ALIGN, offset, is_row, C, K, P, B)
        return a.to(tl.float32), b.to(tl.float32)


@kernel
def _ada_layer_norm_backward_kernel(
    cu_ptr, length, tiles, tokens_per_program,
    dout_ptr, dout_b, dout_n, dy_ptr, dy_b, dy_n, x_ptr, x_b, x_n, branch_ptr, branch_b, branch_n,
    gate_ptr, gate_s, gate_n, bias_ptr, bias_s, scale_ptr, scale_s, scale_n,
    weight_ptr, norm_bias_ptr,
    dx_ptr, dbranch_ptr, dgate_ptr, dscale_ptr, partial_ptr, partial_step, eps,
    IS_RMS: tl.constexpr, C: tl.constexpr, K: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    GATE_OF_TOKEN: tl.constexpr = gate_n is not None
    SCALE_OF_TOKEN: tl.constexpr = scale_n is not None
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    start = tile * tokens_per_program
    stop = min(start + tokens_per_program, span)
    lane = tl.arange(0, ROWS)
    always = lane >= 0
    if not SCALE_OF_TOKEN:
        scale_a, scale_b = _load_float(
            scale_ptr, sample, scale_s, lane, None, always, ALIGN, C, K, P, B
        )
    if gate_ptr is None:
        ga, gb = 1.0, 1.0
    elif not GATE_OF_TOKEN:
        ga, gb = _load_float(gate_ptr, sample, gate_s, lane, None, always, ALIGN, C, K, P, B)
    bias_a, bias_b = _load_float(bias_ptr, sample, bias_s, lane, None, always, ALIGN, C, K, P, B)
    if weight_ptr is None:
        wa, wb = 1.0, 1.0
    else:
        wa, wb = _load_float(weight_ptr, 0, 0, lane, None, always, 1, C, K, P, B)
    za, zb = tl.zeros((K, P), tl.float32), tl.zeros((B,), tl.float32)
    total_a, total_b, along_a, along_b, dgate_a, dgate_b = za, zb, za, zb, za, zb
    dbias_a, dbias_b, dnorm_a, dnorm_b = za, zb, za, zb
    for begin in tl.range(start, stop, ROWS, num_stages=STAGES):
        is_row = always if ROWS == 1 else begin + lane < stop
        row, row_out = first + begin + lane, (first_out + begin + lane) * C
        ra, rb = _load_float(branch_ptr, sample, branch_b, row, branch_n, is_row, ALIGN, C, K, P, B)
        if dy_ptr is not None:
            xa, xb = _load_float(x_ptr, sample, x_b, row, x_n, is_row, ALIGN, C, K, P, B)
            ya, yb = _load_float(dy_ptr, sample, dy_b, row, dy_n, is_row, ALIGN, C, K, P, B)
        da, db = _load_float(dout_ptr, sample, dout_b, row, dout_n, is_row, ALIGN, C, K, P, B)
        if GATE_OF_TOKEN:
            ga, gb = _load_float(gate_ptr, sample, gate_s, row, gate_n, is_row, ALIGN, C, K, P, B)
        ra, rb = ra + bias_a, rb + bias_b
        if dy_ptr is not None:
            xa, xb = xa + ga * ra, xb + gb * rb
            xa, xb, rstd = normalise_chunks(xa, xb, eps, C, LANES, IS_RMS)
            sum_a, sum_b = sum_of_rows(is_row, ya, yb)
            total_a, total_b = total_a + sum_a, total_b + sum_b
            if SCALE_OF_TOKEN:
                scale_a, scale_b = _load_float(
                    scale_ptr, sample, scale_s, row, scale_n, is_row, ALIGN, C, K, P, B
                )
                na, nb = _load_float(norm_bias_ptr, 0, 0, lane, None, always, 1, C, K, P, B)
                sa, sb = ya * (xa * wa + na), yb * (xb * wb + nb)
                store_chunks(dscale_ptr, row_out, is_row, sa, sb, C, K, P, B)
                ya, yb = ya * (1 + scale_a), yb * (1 + scale_b)
                if norm_bias_ptr is not None:
                    sum_a, sum_b = sum_of_rows(is_row, ya, yb)
                    dnorm_a, dnorm_b = dnorm_a + sum_a, dnorm_b + sum_b
            if not SCALE_OF_TOKEN or weight_ptr is not None:
                sum_a, sum_b = sum_of_rows(is_row, ya * xa, yb * xb)
                along_a, along_b = along_a + sum_a, along_b + sum_b
            if not SCALE_OF_TOKEN:
                ya, yb = ya * (1 + scale_a), yb * (1 + scale_b)
            if weight_ptr is not None:
                ya, yb = ya * wa, yb * wb
            ya, yb = normalise_chunks_linear(xa, xb, rstd, ya, yb, C, LANES, IS_RMS)
            da, db = da + ya, db + yb
        store_chunks(dx_ptr, row_out, is_row, da, db, C, K, P, B)
        if branch_ptr is not None:
            store_chunks(dbranch_ptr, row_out, is_row, da * ga, db * gb, C, K, P, B)
            if GATE_OF_TOKEN:
                store_chunks(dgate_ptr, row_out, is_row, da * ra, db * rb, C, K, P, B)
            elif gate_ptr is not None:
                sum_a, sum_b = sum_of_rows(is_row, da * ra, db * rb)
                dgate_a, dgate_b = dgate_a + sum_a, dgate_b + sum_b
            if bias_ptr is not None:
                sum_a, sum_b = sum_of_rows(is_row, da * ga, db * gb)
                dbias_a, dbias_b = dbias_a + sum_a, dbias_b + sum_b

    partial_ptr += tl.program_id(0).to(tl.int64) * C  # (4 or 5, programs, C), in this order:
    step = tl.cast(partial_step, tl.int64) * C
    if dy_ptr is not None:
        store_vector(partial_ptr, total_a, total_b, C, K, P, B)
        if not SCALE_OF_TOKEN or weight_ptr is not None:
            store_vector(partial_ptr + step, along_a, along_b, C, K, P, B)
    if branch_ptr is not None:
        if gate_ptr is not None and not GATE_OF_TOKEN:
            store_vector(partial_ptr + 2 * step, dgate_a, dgate_b, C, K, P, B)
        if bias_ptr is not None:
            store_vector(partial_ptr + 3 * step, dbias_a, dbias_b, C, K, P, B)
    if SCALE_OF_TOKEN and norm_bias_ptr is not None:
        store_vector(partial_ptr + 4 * step, dnorm_a, dnorm_b, C, K, P, B)


@kernel
def _ada_layer_norm_jvp_kernel(
    cu_ptr, length, tiles,
    x_ptr, x_b, x_n, branch_ptr, branch_b, branch_n, gate_ptr, gate_s, gate_n,
    bias_ptr, bias_s, scale_ptr, scale_s, scale_n, weight_ptr, norm_bias_ptr,
    tx_ptr, tx_b, tx_n, tbranch_ptr, tbranch_b, tbranch_n, tgate_ptr, tgate_s, tgate_n,
    tbias_ptr, tbias_s, tshift_ptr, tshift_s, tshift_n, tscale_ptr, tscale_s, tscale_n,
    tweight_ptr, tnorm_bias_ptr, tout_ptr, ty_ptr, eps,
    IS_RMS: tl.constexpr,
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
        if gate_ptr is None:
            ga, gb = 1.0, 1.0
        else:
            ga, gb = _load(gate_ptr, sample, gate_s, row, gate_n, is_row, ALIGN, C, A, B)
        tga, tgb = _load(tgate_ptr, sample, tgate_s, row, tgate_n, is_row, ALIGN, C, A, B)
        bias_a, bias_b = load_row(bias_ptr, sample, bias_s, ALIGN, C, A, B)
        tbias_a, tbias_b = load_row(tbias_ptr, sample, tbias_s, ALIGN, C, A, B)
        ra, rb, va, vb = ra + bias_a, rb + bias_b, va + tbias_a, vb + tbias_b
        xa, xb = xa + ga * ra, xb + gb * rb
        ta, tb = ta + tga * ra + ga * va, tb + tgb * rb + gb * vb
        store_rows(tout_ptr, row_out, is_row, ta, tb, C, A, B)
    if ty_ptr is not None:
        xa, xb, rstd = normalise(xa, xb, eps, C, A, B, IS_RMS=IS_RMS)
        ta, tb = only_channels(ta, tb, C, A, B)
        ta, tb = normalise_linear(xa, xb, rstd, ta, tb, C, IS_RMS=IS_RMS)
        if weight_ptr is not None:
            wa, wb = _load_vector(weight_ptr, C, A, B)
            twa, twb = _load_vector(tweight_ptr, C, A, B)
            ta, tb = ta * wa + xa * twa, tb * wb + xb * twb
            xa, xb = xa * wa, xb * wb
        if norm_bias_ptr is not None:
            wa, wb = _load_vector(norm_bias_ptr, C, A, B)
            twa, twb = _load_vector(tnorm_bias_ptr, C, A, B)
            xa, xb, ta, tb = xa + wa, xb + wb, ta + twa, tb + twb
        scale_a, scale_b = _load(scale_ptr, sample, scale_s, row, scale_n, is_row, ALIGN, C, A, B)
        tscale_a, tscale_b = _load(
            tscale_ptr, sample, tscale_s, row, tscale_n, is_row, ALIGN, C, A, B
        )
        tshift_a, tshift_b = _load(
            tshift_ptr, sample, tshift_s, row, tshift_n, is_row, ALIGN, C, A, B
        )
        ta = ta * (1 + scale_a) + xa * tscale_a + tshift_a
        tb = tb * (1 + scale_b) + xb * tscale_b + tshift_b
        store_rows(ty_ptr, row_out, is_row, ta, tb, C, A, B)


def _tile(direction: str, x: Tensor, branch, norm: str | None, scale=None) -> dict[str, int]:
    """The constants of a kernel over rows of x."""
    elements, num_warps = tuned(f"ada_layer_norm.{direction}", x.device)
    C = x.shape[-1]
    is_float = x.element_size() == 4
    if is_float and direction == "jvp" and branch is None and has_tensor_memory(x.device):
        elements //= 2  # tuned for two bytes
    A, B = pieces(C)
    if A + B > 1152:  # tuned for rows up to there: more channels, more warps to hold them
        num_warps = min(16, num_warps * triton.next_power_of_2(triton.cdiv(A + B, 1152)))
    is_rms = norm == "rms"
    tile = dict(C=C, A=A, B=B, ROWS=tile_rows(C, elements), IS_RMS=is_rms, num_warps=num_warps)
    return tile | dict(maxnreg=_most_registers(direction, x, branch, norm, scale))


def _most_registers(direction: str, x: Tensor, branch, norm: str | None, scale) -> int | None:
    """Of a thread; by themselves compilers load less at a time, or take fewer and spill."""
    if x.element_size() == 4:
        is_many = direction == "jvp" and branch is not None and has_tensor_memory(x.device)
        return 255 if direction == "forward" or is_many else None
    is_small = (norm == "rms" and branch is None) or is_of_token(scale)
    return 168 if direction == "backward" and is_small else None


def _backward_tile(
    x: Tensor, branch: Tensor | None, scale: Tensor | None, norm: str | None
) -> dict[str, int]:
    """Rows in the chunks of lanes.py, two trips ahead where their copies fit into shared memory."""
    tile = _tile("backward", x, branch, norm, scale)
    width = tile.pop("A") + tile.pop("B")
    tile |= chunks(x.shape[-1], x.element_size(), 32 * tile["num_warps"])
    copies = 6 * width * tile["ROWS"] * x.element_size()  # of rows and their conditioning
    tile["STAGES"] = max(1, min(3, COPIES // copies))
    return tile


def forward(*args):
    """(x', y), either of them an empty tensor where the op does not make it."""
    x, *_, norm, _, _ = args
    return _forward(args, like(x, norm))


def fp8(*args):
    """(x', values, scales), y as FP8; x' is empty where there is no branch."""
    shape = args[0].shape
    return _forward(args, Made(shape, torch.float8_e4m3fn), Made((*shape[:-1], 1), torch.float32))


def _forward(args: tuple, *made: Made | None):
    """x' and what else is made: y, or its values and scales."""
    x, branch, *_, eps, norm, cu, max_length = args
    tile = _tile("forward", x, branch, norm)
    programs, length, tiles = token_grid(x, cu, max_length, tile["ROWS"])
    return launch(
        _ada_layer_norm_forward_kernel, (programs,),
        (In(10), length, tiles, *view_tokens(args, 0, 1, is_packed=cu is not None),
         *view_modulation(args, 2), *view_cond(args, 3), *view_modulation(args, 4, 5),
         *view_vectors(args, 6, 7), Out(0), Out(1), Out(2) if made[1:] else None, eps),
        (like(x, branch), *made), args, **tile,
    )  # fmt: skip


def backward(*args):
    """(dx, dbranch, dgate, dscale, sums), gate's and scale's where they are of each token.

    `sums` are float32 (4, samples, C), of dy, dy·x̂, dgate and dbias. With a scale of each token
    the second is of dy·(1 + scale)·x̂, and with a bias of the norm besides there is a fifth, of
    dy·(1 + scale). x' is made again from x and branch, which costs no more bytes than reading it
    and loses nothing to its rounding. Gradients nobody has are empty or unset.
    """
    _, _, x, branch, gate, _, scale, _, norm_bias, eps, norm, cu, max_length = args
    tile = _backward_tile(x, branch, scale, norm)
    tokens = tokens_to_reduce(x, cu, max_length, tile["num_warps"], tile["ROWS"])
    programs, length, tiles = token_grid(x, cu, max_length, tokens)
    samples, _ = samples_and_length(x, cu, max_length)
    partial = Made((sums(scale, norm_bias), samples, tiles, x.shape[-1]), torch.float32)
    return launch(
        _ada_layer_norm_backward_kernel, (programs,),
        (In(11), length, tiles, tokens, *view_tokens(args, 0, 1, 2, 3, is_packed=cu is not None),
         *view_modulation(args, 4), *view_cond(args, 5), *view_modulation(args, 6),
         *view_vectors(args, 7, 8), Out(0), Out(1), Out(2), Out(3), Out(4), programs, eps),
        (like(x), like(branch), *(like(c) if is_of_token(c) else None for c in (gate, scale)),
         partial), args,
        finish=lambda *made: (*made[:4], made[4].sum(2)), **tile,
    )  # fmt: skip


def jvp(*args):
    """Tangents of (x', y); a tangent that is None is zero."""
    x, branch, *_, eps, norm, cu, max_length = args[:12]
    tile, is_packed = _tile("jvp", x, branch, norm), cu is not None
    programs, length, tiles = token_grid(x, cu, max_length, tile["ROWS"])
    return launch(
        _ada_layer_norm_jvp_kernel, (programs,),
        (In(10), length, tiles,
         *view_tokens(args, 0, 1, is_packed=is_packed), *view_modulation(args, 2),
         *view_cond(args, 3), *view_modulation(args, 5), *view_vectors(args, 6, 7),
         *view_tokens(args, 12, 13, is_packed=is_packed), *view_modulation(args, 14),
         *view_cond(args, 15), *view_modulation(args, 16, 17),
         *view_vectors(args, 18, 19), Out(0), Out(1), eps),
        (like(x, branch), like(x, norm)), args, **tile,
    )  # fmt: skip
