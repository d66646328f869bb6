"""Triton kernels of the sinusoids of several times, in one launch.

Row (slot, sample) of the output (slots, B, 256) is [cos(τ·f), sin(τ·f)], τ the time that the slot
asks for: t, r or t − r. The frequencies f_i = exp(−ln(10000)·i/128) are made in every program, in
the same steps as the reference: the exponent rounded to float32, its exponential in float64 and
then rounded, so that an angle of a thousand radians is the reference's, bit for bit almost always.
They are made again in backward and tangent.

Sine and cosine are computed together, in float64, after a reduction that is exact for any float32.
libdevice's would reduce the angle twice, in local memory before Triton 3.9. A program has one row,
a thread one frequency: the rows are few and short, what costs is the arithmetic.

In the kernels d is a gradient, dc and ds of cosine and sine, tt and tr tangents of t and r.
"""

import torch
import triton
import triton.language as tl

from ..launch.calls import Made, Out, like
from ..launch.grid import kernel, launch
from ..launch.views import In, view_vectors
from .slots import slot_codes

HALF = tl.constexpr(128)  # frequencies, of which each of 4 warps has 32
LOG_PERIOD = tl.constexpr(9.210340371976184)  # ln 10000
HALF_PI = tl.constexpr(1.5707963267948966)
TWO_OVER_PI = tl.constexpr(0xA2F9836E4E441529FC2757D1F534DDC0DB6295993C43)  # its first 176 bits


@triton.jit
def _frequencies():
    exponent = -LOG_PERIOD * tl.arange(0, HALF).to(tl.float32) / HALF
    return tl.exp(exponent.to(tl.float64)).to(tl.float32)


@triton.jit
def _cos_sin(x):
    """cos x and sin x of float32, as float32; NaN where x is not finite.

    The reduction is Payne's and Hanek's: x in quarter turns is its product with 2/π, of which each
    piece of 29 bits makes one that is exact in float64 and counts modulo a whole turn.
    """
    x, quarters = x.to(tl.float64), 0.0
    for i in tl.static_range(29, 29 * 7, 29):
        product = x * ((TWO_OVER_PI >> (176 - i)) % 2**29 * 2.0**-i)
        quarters += product - 4.0 * tl.floor(product * 0.25 + 0.5)
    nearest = tl.floor(quarters + 0.5)
    r = (quarters - nearest) * HALF_PI  # within ±π/4, where Taylor's series are short
    s = r * r
    cos, sin = 1.0, 1.0
    for i in tl.static_range(10, -1, -2):
        cos = 1.0 - s * (1 / ((i + 1) * (i + 2))) * cos
        sin = 1.0 - s * (1 / ((i + 2) * (i + 3))) * sin
    sin *= r
    quadrant = nearest.to(tl.int32)
    is_odd, is_opposite = (quadrant & 1) != 0, (quadrant & 2) != 0
    cos, sin = tl.where(is_odd, -sin, cos), tl.where(is_odd, cos, sin)
    cos, sin = tl.where(is_opposite, -cos, cos), tl.where(is_opposite, -sin, sin)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def _load(ptr, stride, sample):
    """A sample's time as float32; zero if ptr is None."""
    if ptr is None:
        return 0.0
    else:
        return tl.load(ptr + sample * stride).to(tl.float32)


@triton.jit
def _pick(codes, slot, t, r):
    """t, r or t − r: what the slot asks for. Two bits a slot, as in slots.py."""
    code = (codes >> (2 * slot)) & 3
    return tl.where(code == 0, t, tl.where(code == 1, r, t - r))


@triton.jit
def _halves(ptr, row):
    """Pointers to the two halves of a row."""
    left = ptr + row * (2 * HALF) + tl.arange(0, HALF)
    return left, left + HALF


@kernel
def _time_pair_embedding_forward_kernel(B, codes, t_ptr, t_stride, r_ptr, r_stride, out_ptr):
    row = tl.program_id(0).to(tl.int64)
    slot, sample = row // B, row % B
    t, r = _load(t_ptr, t_stride, sample), _load(r_ptr, r_stride, sample)
    cos, sin = _cos_sin(_pick(codes, slot, t, r) * _frequencies())
    left, right = _halves(out_ptr, row)
    tl.store(left, cos)
    tl.store(right, sin)


@kernel
def _time_pair_embedding_jvp_kernel(
    B, codes, t_ptr, t_stride, r_ptr, r_stride, tt_ptr, tt_stride, tr_ptr, tr_stride, out_ptr
):
    row = tl.program_id(0).to(tl.int64)
    slot, sample = row // B, row % B
    t, r = _load(t_ptr, t_stride, sample), _load(r_ptr, r_stride, sample)
    tt, tr = _load(tt_ptr, tt_stride, sample), _load(tr_ptr, tr_stride, sample)
    f = _frequencies()
    cos, sin = _cos_sin(_pick(codes, slot, t, r) * f)
    rate = _pick(codes, slot, tt, tr) * f
    left, right = _halves(out_ptr, row)
    tl.store(left, -sin * rate)
    tl.store(right, cos * rate)


@kernel
def _time_pair_embedding_backward_kernel(
    B, slots, codes, d_ptr, t_ptr, t_stride, r_ptr, r_stride, dt_ptr, dr_ptr
):
    sample = tl.program_id(0).to(tl.int64)
    t, r = _load(t_ptr, t_stride, sample), _load(r_ptr, r_stride, sample)
    f = _frequencies()
    dt, dr = 0.0, 0.0
    for slot in range(slots):
        cos, sin = _cos_sin(_pick(codes, slot, t, r) * f)
        left, right = _halves(d_ptr, sample + tl.cast(slot, tl.int64) * B)
        dc, ds = tl.load(left).to(tl.float32), tl.load(right).to(tl.float32)
        d = tl.sum((ds * cos - dc * sin) * f, 0)
        dt += _pick(codes, slot, d, 0.0)
        dr += _pick(codes, slot, 0.0, d)
    tl.store(dt_ptr + sample, dt)
    tl.store(dr_ptr + sample, dr)


def _times(args: tuple, *indices: int) -> list[In]:
    return [In(i, (0 if args[i] is None else args[i].stride(0),)) for i in indices]


def _sinusoids(function, args: tuple, times: str, dtype: torch.dtype, *vectors: int):
    (slots, codes), B = slot_codes(times), args[0].shape[0]
    return launch(
        function, (slots * B,), (B, codes, *_times(args, *vectors), Out(0)),
        (Made((slots, B, 2 * HALF.value), dtype),), args, num_warps=4,
    )  # fmt: skip


def forward(*args):
    """The sinusoids (slots, B, 256) of `times`, a list like "t,r,t-r"."""
    return _sinusoids(_time_pair_embedding_forward_kernel, args, *args[2:4], 0, 1)


def jvp(*args):
    """The tangent of the sinusoids; a tangent that is None is zero."""
    return _sinusoids(_time_pair_embedding_jvp_kernel, args, *args[2:4], 0, 1, 4, 5)


def backward(*args):
    """(dt, dr), in the times' dtypes."""
    _, t, r, times = args
    slots, codes = slot_codes(times)
    B = t.shape[0]
    arguments = B, slots, codes, *view_vectors(args, 0), *_times(args, 1, 2), Out(0), Out(1)
    function = _time_pair_embedding_backward_kernel
    return launch(function, (B,), arguments, (like(t), like(r)), args, num_warps=4)
