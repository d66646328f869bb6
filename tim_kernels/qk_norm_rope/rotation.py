"""Triton helpers of axial RoPE: the angles of a token, and the turning of its heads."""

import triton
import triton.language as tl

TWO_OVER_PI = tl.constexpr(0.6366197723675814)
HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def _cos_sin(angle):
    """cos and sin of a float32 angle to float32 accuracy, at any angle that a position can make.

    The multiple of π/2 is taken off in float64; what is left, |r| ≤ π/4, goes into the Taylor
    series, whose remainders are below 2e-9. (libdevice's functions carry a slow path that needs
    local memory.) The sums over one element keep the compiler from making every angle again in
    every thread that needs it, as it does not see through a reduction: two angles a thread and
    token instead of nine in backward at head_dim 72.
    """
    wide = angle.to(tl.float64)
    quarter = tl.floor(wide * TWO_OVER_PI + 0.5)
    r = (wide - quarter * HALF_PI).to(tl.float32)
    z = r * r
    sin = z * (z * (1.0 / 362880) - 1.0 / 5040)
    sin = r + r * (z * (z * (sin + 1.0 / 120) - 1.0 / 6))
    cos = z * (z * (z * (-1.0 / 3628800) + 1.0 / 40320) - 1.0 / 720)
    cos = 1.0 + z * (z * (cos + 1.0 / 24) - 0.5)
    turns = quarter.to(tl.int64).to(tl.int32)
    is_odd = (turns & 1) != 0
    new_cos, new_sin = tl.where(is_odd, sin, cos), tl.where(is_odd, cos, sin)
    new_cos = tl.where(((turns + 1) & 2) != 0, -new_cos, new_cos)
    new_sin = tl.where((turns & 2) != 0, -new_sin, new_sin)
    return tl.sum(new_cos[:, :, None], 2), tl.sum(new_sin[:, :, None], 2)


@triton.jit
def axial_turn(
    positions, sample, first, n, is_n,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(cos, sin, cos, sin) of the pairs of both pieces, (T, A/2) and (T, B/2), of tokens n."""
    position_ptr, position_b, period, periods_ptr, periods_s, freq_ptr = positions
    if position_ptr is not None:
        at = position_ptr + sample * position_b + (first + n) * 2
        p0 = tl.load(at, mask=is_n, other=0).to(tl.float32)
        p1 = tl.load(at + 1, mask=is_n, other=0).to(tl.float32)
    else:
        if periods_ptr is not None:
            period = tl.load(periods_ptr + sample * periods_s).to(tl.int32)
        period = tl.maximum(period, 1)
        p0, p1 = (n % period).to(tl.float32), (n // period).to(tl.float32)
    F: tl.constexpr = D // 4
    pair_a, pair_b = tl.arange(0, A // 2), A // 2 + tl.arange(0, B // 2)
    freq_a, freq_b = tl.load(freq_ptr + pair_a % F), tl.load(freq_ptr + pair_b % F)
    p0, p1 = p0[:, None], p1[:, None]
    angle_a = tl.where((pair_a < F)[None, :], p0, p1) * freq_a[None, :]
    angle_b = tl.where((pair_b < F)[None, :], p0, p1) * freq_b[None, :]
    cos_a, sin_a = _cos_sin(angle_a)
    cos_b, sin_b = _cos_sin(angle_b)
    return cos_a, sin_a, cos_b, sin_b


@triton.jit
def _rotate_piece(x, cos, sin, T: tl.constexpr, HB: tl.constexpr, P: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, (T, HB, P // 2, 2)))
    cos, sin = cos[:, None, :], sin[:, None, :]
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (T * HB, P))


@triton.jit
def rotate(
    xa, xb, turn, sign,
    T: tl.constexpr, HB: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rows turned by their token's angles, or back if sign is −1; as they are if turn is None."""
    if turn is None:
        return xa, xb
    else:
        cos_a, sin_a, cos_b, sin_b = turn
        xa = _rotate_piece(xa, cos_a, sin_a * sign, T, HB, A)
        return xa, _rotate_piece(xb, cos_b, sin_b * sign, T, HB, B)
