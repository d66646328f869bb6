"""Triton helpers of axial RoPE: the angles of a token, and the turning of its heads."""

import triton
import triton.language as tl

TWO_OVER_PI = tl.constexpr(0.6366197723675814)
HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def _apart(x):
    return tl.sum(tl.expand_dims(x, -1), len(x.shape))


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
    return _apart(new_cos), _apart(new_sin)


@triton.jit
def load_frequencies(
    freq_ptr, D: tl.constexpr, K: tl.constexpr, P: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """(pairs, frequencies) of both pieces, (K, 1, P/2) and (1, B/2); None without RoPE."""
    if freq_ptr is None:
        return
    else:
        F: tl.constexpr = D // 4
        pair_a = tl.arange(0, K)[:, None, None] * (P // 2) + tl.arange(0, P // 2)[None, None, :]
        pair_b = (K * P // 2 + tl.arange(0, B // 2))[None, :]
        return (
            pair_a < F,
            tl.load(freq_ptr + pair_a % F),
            pair_b < F,
            tl.load(freq_ptr + pair_b % F),
        )


@triton.jit
def axial_turn(frequencies, positions, sample, first, n, is_n):
    """(cos, sin, cos, sin) of the pairs of both pieces, (K, T, P/2) and (T, B/2), of tokens n."""
    if frequencies is None:
        return
    else:
        position_ptr, position_b, period, periods_ptr, periods_s, _ = positions
        if position_ptr is not None:
            at = position_ptr + sample * position_b + (first + n) * 2
            p0 = tl.load(at, mask=is_n, other=0).to(tl.float32)
            p1 = tl.load(at + 1, mask=is_n, other=0).to(tl.float32)
        else:
            if periods_ptr is not None:
                period = tl.load(periods_ptr + sample * periods_s).to(tl.int32)
            period = tl.maximum(period, 1)
            p0, p1 = (n % period).to(tl.float32), (n // period).to(tl.float32)
        is_first_a, freq_a, is_first_b, freq_b = frequencies
        angle_a = tl.where(is_first_a, p0[None, :, None], p1[None, :, None]) * freq_a
        angle_b = tl.where(is_first_b, p0[:, None], p1[:, None]) * freq_b
        cos_a, sin_a = _cos_sin(angle_a)
        cos_b, sin_b = _cos_sin(angle_b)
        return cos_a, sin_a, cos_b, sin_b


@triton.jit
def _turned(x, cos, sin):
    """Pairs of the last axis."""
    even, odd = tl.split(x)
    return tl.join(even * cos - odd * sin, even * sin + odd * cos)


@triton.jit
def rotate(xa, xb, turn, sign, T: tl.constexpr):
    """Rows (K, T·heads, P) and (T·heads, B) turned by their token's angles, or back if sign is −1;
    as they are if turn is None."""
    if turn is None:
        return xa, xb
    else:
        cos_a, sin_a, cos_b, sin_b = turn
        K: tl.constexpr = xa.shape[0]
        HB: tl.constexpr = xa.shape[1] // T
        P: tl.constexpr = xa.shape[2]
        B: tl.constexpr = xb.shape[1]
        ya = tl.reshape(xa, (K, T, HB, P // 2, 2))
        ya = _turned(ya, cos_a[:, :, None, :], sign * sin_a[:, :, None, :])
        yb = tl.reshape(xb, (T, HB, B // 2, 2))
        yb = _turned(yb, cos_b[:, None, :], sign * sin_b[:, None, :])
        return tl.reshape(ya, xa.shape), tl.reshape(yb, xb.shape)
