"""Triton helpers for kernels that hold whole rows of tokens.

A row of C channels is kept as two power-of-two pieces, A + B ≥ C with A the largest power of two
below C: 1152 = 1024 + 128 and 768 = 512 + 256 waste no lane, where one piece would pay for 2048
and 1024. Tiles are (ROWS, A) and (ROWS, B), always float32; masked lanes are zero.
"""

import triton
import triton.language as tl


def pieces(width: int) -> tuple[int, int]:
    """(A, B) for rows of `width` channels."""
    a = max(1, triton.next_power_of_2(width) // 2)
    return a, max(1, triton.next_power_of_2(width - a))


def tile_rows(width: int, elements: int) -> int:
    """How many rows make a tile of about `elements` elements, 16 at most."""
    return max(1, min(16, elements // pieces(width)[0]))


def row_tile(width: int, elements: int, num_warps: int, widest: int) -> dict[str, int]:
    """The constants of a kernel over whole rows. Elements and warps are chosen for rows of up to
    `widest` channels; wider ones have more warps, 16 at most."""
    A, B = pieces(width)
    more = triton.next_power_of_2(triton.cdiv(A + B, widest))
    rows = tile_rows(width, elements)
    return dict(C=width, A=A, B=B, ROWS=rows, num_warps=min(16, num_warps * more))


@triton.jit
def locate(cu_ptr, length, tiles):
    """Which tokens a program has: its sample, its tile, the first row of the sample in an input
    view and in a contiguous output, and the sample's length."""
    program = tl.program_id(0)
    sample, tile = (program // tiles).to(tl.int64), program % tiles
    if cu_ptr is None:
        return sample, tile, sample * 0, sample * length, length
    else:
        first = tl.load(cu_ptr + sample)
        span = tl.load(cu_ptr + sample + 1) - first
        return sample, tile, first.to(tl.int64), first.to(tl.int64), span


@triton.jit
def load_rows(
    ptr, sample, stride_b, row, stride_n, is_row, ALIGN: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rows `row` (ROWS,) int64 of a sample's view as float32 pieces (ROWS, A), (ROWS, B);
    zeros if ptr is None."""
    if ptr is None:
        zero = tl.zeros_like(row).to(tl.float32)[:, None]
        return zero + tl.zeros((1, A), tl.float32), zero + tl.zeros((1, B), tl.float32)
    else:
        start = ptr + sample * stride_b * ALIGN + (row * stride_n * ALIGN)[:, None]
        column_a, column_b = tl.arange(0, A)[None, :], A + tl.arange(0, B)[None, :]
        a = tl.load(start + column_a, mask=is_row[:, None] & (column_a < C), other=0.0)
        b = tl.load(start + column_b, mask=is_row[:, None] & (column_b < C), other=0.0)
        return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_rows(ptr, row, is_row, a, b, C: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Write rows `row` (ROWS,) int64 of a contiguous (…, C) tensor."""
    start = ptr + (row * C)[:, None]
    column_a, column_b = tl.arange(0, A)[None, :], A + tl.arange(0, B)[None, :]
    tl.store(start + column_a, a, mask=is_row[:, None] & (column_a < C))
    tl.store(start + column_b, b, mask=is_row[:, None] & (column_b < C))


@triton.jit
def store_rows_fp8(
    ptr, scale_ptr, row, is_row, a, b, C: tl.constexpr, A: tl.constexpr, B: tl.constexpr
):
    """Write rows as FP8 E4M3, and the scale of each, as `quantise_rows` of ..fp8 does.

    The largest magnitude is found among the bits: there NaN is above infinity, where a maximum of
    floats would lose it.
    """
    bits_a = tl.abs(a).to(tl.int32, bitcast=True)
    bits_b = tl.abs(b).to(tl.int32, bitcast=True)
    bits = tl.maximum(tl.max(bits_a, 1), tl.max(bits_b, 1))
    bits = tl.maximum(bits, 27 << 23)  # 2^-100
    most = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(most, tl.full(most.shape, 448.0, tl.float32))
    inverse = tl.div_rn(tl.full(most.shape, 1.0, tl.float32), scale)[:, None]
    tl.store(scale_ptr + row, scale, mask=is_row)
    store_rows(ptr, row, is_row, a * inverse, b * inverse, C, A, B)  # the cast saturates


@triton.jit
def load_row(
    ptr, sample, stride, ALIGN: tl.constexpr, C: tl.constexpr, A: tl.constexpr, B: tl.constexpr
):
    """A sample's conditioning row as float32 pieces (1, A), (1, B); zeros if ptr is None."""
    if ptr is None:
        return tl.zeros((1, A), tl.float32), tl.zeros((1, B), tl.float32)
    else:
        start = ptr + sample * stride * ALIGN
        column_a, column_b = tl.arange(0, A)[None, :], A + tl.arange(0, B)[None, :]
        a = tl.load(start + column_a, mask=column_a < C, other=0.0)
        b = tl.load(start + column_b, mask=column_b < C, other=0.0)
        return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def row_sum(a, b):
    """Sum over channels, (ROWS, 1)."""
    return (tl.sum(a, 1) + tl.sum(b, 1))[:, None]


@triton.jit
def only_channels(a, b, C: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Zero in the lanes past the last channel."""
    if A + B == C:
        return a, b
    else:
        column_a, column_b = tl.arange(0, A)[None, :], A + tl.arange(0, B)[None, :]
        return tl.where(column_a < C, a, 0.0), tl.where(column_b < C, b, 0.0)


@triton.jit
def normalise(
    a, b, eps, C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, IS_RMS: tl.constexpr = False
):  # fmt: skip
    """x̂ = (x − mean)·rstd of each row, and rstd; masked lanes stay zero. RMSNorm has no mean.

    The mean is taken twice, the second time of the centred row, so that rows far from zero lose
    nothing to the rounding of a large sum.
    """
    if not IS_RMS:
        mean = row_sum(a, b) / C
        a, b = only_channels(a - mean, b - mean, C, A, B)
        rest = row_sum(a, b) / C
        a, b = only_channels(a - rest, b - rest, C, A, B)
    rstd = 1.0 / tl.sqrt_rn(row_sum(a * a, b * b) / C + eps)
    return a * rstd, b * rstd, rstd


@triton.jit
def normalise_linear(
    xa, xb, rstd, ta, tb, C: tl.constexpr, IS_RMS: tl.constexpr = False
):  # fmt: skip
    """The derivative of `normalise` at x̂ applied to t; it is its own transpose.

    rstd·(t − mean(t) − x̂·mean(x̂·t)) is the tangent of x̂ and the gradient of x alike; RMSNorm has
    no mean(t).
    """
    if not IS_RMS:
        mean = row_sum(ta, tb) / C
    along = row_sum(xa * ta, xb * tb) / C
    if not IS_RMS:
        ta, tb = ta - mean, tb - mean
    return rstd * (ta - xa * along), rstd * (tb - xb * along)
