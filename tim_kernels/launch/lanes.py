"""Triton helpers for kernels whose threads share a row in equal parts.

A row of C channels is two power-of-two pieces, A + B ≥ C as in rows.py, the first in K chunks of
P channels: tiles are (K, R, P) and (R, B), zero past the last channel. LANES threads have a row,
each 16 bytes of every chunk and B / LANES channels of the rest. A sum over channels is then one
over the lanes, of what each has summed itself: half the exchanges of two pieces, and none between
layouts. That threads lie so is the compiler's choice; results do not depend on it.
"""

import triton
import triton.language as tl

from .rows import pieces


def chunks(width: int, element_size: int, lanes: int | None = None) -> dict[str, int]:
    """K, P, B and LANES for rows of `width` channels; the fewest lanes, 4 at least, that have 16
    bytes of each piece, or those asked for."""
    A, B = pieces(width)
    of_lane = 16 // element_size
    P = min(A, max(A // 2, max(4 * of_lane, B) if lanes is None else lanes * of_lane))
    return dict(K=A // P, P=P, B=B, LANES=max(1, P // of_lane))


@triton.jit
def _load_piece(ptr, offset, is_row, channel, C: tl.constexpr, N: tl.constexpr, END: tl.constexpr):
    """N channels from `channel` on, of rows; END is one past the last of them."""
    at = channel + tl.arange(0, N)[None, :]
    mask = is_row[:, None] if END <= C else is_row[:, None] & (at < C)
    return tl.load(ptr + (offset[:, None] + at), mask=mask, other=0.0)


@triton.jit
def _store_piece(
    ptr, offset, is_row, channel, x, C: tl.constexpr, N: tl.constexpr, END: tl.constexpr
):  # fmt: skip
    at = channel + tl.arange(0, N)[None, :]
    mask = is_row[:, None] if END <= C else is_row[:, None] & (at < C)
    tl.store(ptr + (offset[:, None] + at), x, mask=mask)


@triton.jit
def load_chunks(
    ptr, offset, is_row, C: tl.constexpr, K: tl.constexpr, P: tl.constexpr, B: tl.constexpr
):
    """Rows that start at `offset` (R,), as they are: (K, R, P) and (R, B)."""
    a = _load_piece(ptr, offset, is_row, 0, C, P, P)
    if K == 1:
        a = tl.reshape(a, (1, a.shape[0], P))
    else:  # not one load: some compilers would give chunks to different threads
        a = tl.join(a, _load_piece(ptr, offset, is_row, P, C, P, 2 * P))
        a = tl.permute(a, (2, 0, 1))
    return a, _load_piece(ptr, offset, is_row, K * P, C, B, K * P + B)


@triton.jit
def store_chunks(
    ptr, offset, is_row, a, b, C: tl.constexpr, K: tl.constexpr, P: tl.constexpr, B: tl.constexpr
):
    if K == 1:
        _store_piece(ptr, offset, is_row, 0, tl.reshape(a, (a.shape[1], P)), C, P, P)
    else:
        first, second = tl.split(tl.permute(a, (1, 2, 0)))
        _store_piece(ptr, offset, is_row, 0, first, C, P, P)
        _store_piece(ptr, offset, is_row, P, second, C, P, 2 * P)
    _store_piece(ptr, offset, is_row, K * P, b, C, B, K * P + B)


@triton.jit
def store_vector(ptr, a, b, C: tl.constexpr, K: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    """Write one row from (K, P) and (B,)."""
    channel_a = tl.arange(0, K)[:, None] * P + tl.arange(0, P)[None, :]
    channel_b = K * P + tl.arange(0, B)
    tl.store(ptr + channel_a, a)
    tl.store(ptr + channel_b, b, mask=channel_b < C)


@triton.jit
def _lane_sums(a, b, LANES: tl.constexpr):
    """(R, LANES), of each thread's channels; of tiny pieces all at once, (R, 1)."""
    R: tl.constexpr = b.shape[0]
    P: tl.constexpr = a.shape[2]
    B: tl.constexpr = b.shape[1]
    a = tl.sum(a, 0)
    if P % LANES == 0 and B % LANES == 0:
        a = tl.sum(tl.reshape(a, (R, LANES, P // LANES)), 2)
        return a + tl.sum(tl.reshape(b, (R, LANES, B // LANES)), 2)
    else:
        return (tl.sum(a, 1) + tl.sum(b, 1))[:, None]


@triton.jit
def sum_channels(a, b, LANES: tl.constexpr):
    """(R,)"""
    return tl.sum(_lane_sums(a, b, LANES), 1)


@triton.jit
def sum_channels_of_two(a, b, c, d, LANES: tl.constexpr):
    """(R,) of a, b and (R,) of c, d, in one exchange."""
    both = tl.join(_lane_sums(a, b, LANES), _lane_sums(c, d, LANES))
    return tl.split(tl.sum(both, 1))


@triton.jit
def only_real(a, b, C: tl.constexpr):
    """Zero in the lanes past the last channel."""
    K: tl.constexpr = a.shape[0]
    P: tl.constexpr = a.shape[2]
    B: tl.constexpr = b.shape[1]
    if K * P + B == C:
        return a, b
    else:
        return a, tl.where(tl.arange(0, B)[None, :] + K * P < C, b, 0.0)


@triton.jit
def normalise_chunks(a, b, eps, C: tl.constexpr, LANES: tl.constexpr, IS_RMS: tl.constexpr = False):
    """`normalise` of rows.py: x̂ of each row, and rstd (R,)."""
    if IS_RMS:
        square = sum_channels(a * a, b * b, LANES) / C
        rstd = tl.rsqrt(square + eps)
        return a * rstd[None, :, None], b * rstd[:, None], rstd
    else:
        mean = sum_channels(a, b, LANES) / C
        a, b = only_real(a - mean[None, :, None], b - mean[:, None], C)
        rest, square = sum_channels_of_two(a, b, a * a, b * b, LANES)
        rest, square = rest / C, square / C
        rstd = tl.rsqrt(tl.maximum(square - rest * rest, 0.0) + eps)
        rest = -rest * rstd
        a, b = a * rstd[None, :, None] + rest[None, :, None], b * rstd[:, None] + rest[:, None]
        a, b = only_real(a, b, C)
        return a, b, rstd


@triton.jit
def normalise_chunks_linear(
    xa, xb, rstd, ta, tb, C: tl.constexpr, LANES: tl.constexpr, IS_RMS: tl.constexpr = False
):
    """`normalise_linear` of rows.py."""
    if IS_RMS:
        along = sum_channels(xa * ta, xb * tb, LANES)
        ta, tb = ta * rstd[None, :, None], tb * rstd[:, None]
    else:
        mean, along = sum_channels_of_two(ta, tb, xa * ta, xb * tb, LANES)
        mean = mean / C * rstd
        ta, tb = ta * rstd[None, :, None] - mean[None, :, None], tb * rstd[:, None] - mean[:, None]
    along = along / C * rstd
    return ta - xa * along[None, :, None], tb - xb * along[:, None]


@triton.jit
def sum_of_rows(is_row, a, b):
    """Sum over the rows of a tile, (K, P) and (B,)."""
    if b.shape[0] > 1:
        a, b = tl.where(is_row[None, :, None], a, 0.0), tl.where(is_row[:, None], b, 0.0)
    return tl.sum(a, 1), tl.sum(b, 0)
