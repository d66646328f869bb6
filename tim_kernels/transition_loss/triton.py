"""Triton kernels of the transition loss.

For the prediction p and the target t of a sample, C channels at each of N positions,

    t = a_x x + a_z z + a_D D + a_c F_c + a_u F_u,  D = rate·(F_+ − F_−) for the trailing samples
    squared = Σ (p − t)² / CN                       cosine = Σ_n (1 − cos(p_n, t_n)) / N
    cos(p, t) = ⟨p, t⟩ / (|p| |t|), each norm at least EPS

A program has all channels of a block of positions, so that nothing is read twice; the target is
made again in backward and tangent and never written. With u = p/|p| and v = t/|t|, the gradient of
cos is (v − cos·u)/|p|, without its second term where |p| is below EPS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch.calls import Made, Out, like
from ..launch.grid import kernel
from ..launch.latents import LatentGrid, load, scaled
from ..launch.views import view_latents, view_vectors
from .reference import EPS


@triton.jit
def _target(
    sample, skipped, offset, mask, x_ptr, x_b, z_ptr, z_b, plus_ptr, plus_b, minus_ptr, minus_b,
    f_cond_ptr, f_cond_b, f_uncond_ptr, f_uncond_b, a_x, a_z, a_d, a_cond, a_uncond, rate,
    ALIGN: tl.constexpr,
):  # fmt: skip
    target = scaled(a_x, sample, load(x_ptr, sample, x_b, offset, mask, ALIGN))
    target += scaled(a_z, sample, load(z_ptr, sample, z_b, offset, mask, ALIGN))
    if plus_ptr is not None:
        row = sample - skipped
        if row >= 0:
            d = load(plus_ptr, row, plus_b, offset, mask, ALIGN)
            if minus_ptr is not None:
                d = (d - load(minus_ptr, row, minus_b, offset, mask, ALIGN)) * rate
            target += scaled(a_d, sample, d)
    if f_cond_ptr is not None:
        f = load(f_cond_ptr, sample, f_cond_b, offset, mask, ALIGN)
        target += scaled(a_cond, sample, f)
        f = load(f_uncond_ptr, sample, f_uncond_b, offset, mask, ALIGN)
        target += scaled(a_uncond, sample, f)
    return target


@triton.jit
def _unit(x, EPS: tl.constexpr):
    """x/|x| over channels, |x| (BLOCK,) raised to EPS, and where it was less; NaN stays."""
    norm = tl.sqrt_rn(tl.sum(x * x, 0))
    is_small = norm < EPS
    norm = tl.where(is_small, EPS, norm)
    return x / norm[None, :], norm, is_small


@triton.jit
def _cosine(p, t, EPS: tl.constexpr):
    """1 − cos(p, t) at each position, (BLOCK,)."""
    u, _, _ = _unit(p, EPS)
    v, _, _ = _unit(t, EPS)
    return 1.0 - tl.sum(u * v, 0)


@triton.jit
def _cosine_gradient(p, t, EPS: tl.constexpr):
    """The gradient of `_cosine` in p, (CHANNELS, BLOCK)."""
    u, p_norm, is_small = _unit(p, EPS)
    v, _, _ = _unit(t, EPS)
    along = tl.where(is_small, 0.0, tl.sum(u * v, 0))
    return (u * along[None, :] - v) / p_norm[None, :]


@kernel
def _transition_loss_forward_kernel(
    length, programs, tiles, skipped, p_ptr, p_b,
    x_ptr, x_b, z_ptr, z_b, plus_ptr, plus_b, minus_ptr, minus_b,
    f_cond_ptr, f_cond_b, f_uncond_ptr, f_uncond_b, a_x, a_z, a_d, a_cond, a_uncond, rate,
    per_element, per_position, tangent_ptr, tangent_b, partial_ptr,
    C: tl.constexpr, CHANNELS: tl.constexpr, EPS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // programs).to(tl.int64)
    begin = (tl.program_id(0) % programs).to(tl.int64) * (tiles * BLOCK)
    positions = tl.cast(length, tl.int64) * ALIGN
    channel = tl.arange(0, CHANNELS)[:, None]
    squared, cosine = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for tile in range(tiles):
        position = begin + tile * BLOCK + tl.arange(0, BLOCK)
        is_position = position < positions
        offset = channel * positions + position[None, :]
        mask = (channel < C) & is_position[None, :]
        p = load(p_ptr, sample, p_b, offset, mask, ALIGN)
        t = _target(
            sample, skipped, offset, mask, x_ptr, x_b, z_ptr, z_b,
            plus_ptr, plus_b, minus_ptr, minus_b, f_cond_ptr, f_cond_b, f_uncond_ptr, f_uncond_b,
            a_x, a_z, a_d, a_cond, a_uncond, rate, ALIGN,
        )  # fmt: skip
        if tangent_ptr is None:
            squared += tl.sum((p - t) * (p - t), 0)
            cosine += tl.where(is_position, _cosine(p, t, EPS), 0.0)
        else:
            tangent = load(tangent_ptr, sample, tangent_b, offset, mask, ALIGN)
            squared += 2.0 * tl.sum((p - t) * tangent, 0)
            cosine += tl.sum(_cosine_gradient(p, t, EPS) * tangent, 0)
    partial_ptr += tl.program_id(0)  # (2, programs)
    tl.store(partial_ptr, tl.sum(squared, 0) * per_element)
    tl.store(partial_ptr + tl.num_programs(0), tl.sum(cosine, 0) * per_position)


@kernel
def _transition_loss_backward_kernel(
    length, programs, d_squared, d_cosine, skipped, p_ptr, p_b,
    x_ptr, x_b, z_ptr, z_b, plus_ptr, plus_b, minus_ptr, minus_b,
    f_cond_ptr, f_cond_b, f_uncond_ptr, f_uncond_b, a_x, a_z, a_d, a_cond, a_uncond, rate,
    per_element, per_position, dp_ptr,
    C: tl.constexpr, CHANNELS: tl.constexpr, EPS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // programs).to(tl.int64)
    positions = tl.cast(length, tl.int64) * ALIGN
    channel = tl.arange(0, CHANNELS)[:, None]
    position = (tl.program_id(0) % programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offset = channel * positions + position[None, :]
    mask = (channel < C) & (position < positions)[None, :]
    p = load(p_ptr, sample, p_b, offset, mask, ALIGN)
    t = _target(
        sample, skipped, offset, mask, x_ptr, x_b, z_ptr, z_b,
        plus_ptr, plus_b, minus_ptr, minus_b, f_cond_ptr, f_cond_b, f_uncond_ptr, f_uncond_b,
        a_x, a_z, a_d, a_cond, a_uncond, rate, ALIGN,
    )  # fmt: skip
    dp = tl.zeros_like(p)
    if d_squared is not None:
        dp += scaled(d_squared, sample, 2.0 * per_element * (p - t))
    if d_cosine is not None:
        dp += scaled(d_cosine, sample, per_position * _cosine_gradient(p, t, EPS))
    tl.store(dp_ptr + sample * positions * C + offset, dp, mask=mask)


def _plan(p: Tensor, dF: Tensor | None, epsilon: float | None):
    """The grid and constants of a loss over latents p (B, C, …), its numbers: how many leading
    samples have no derivative, 1/2ε, and one over a sample's elements and positions."""
    C, positions = p.shape[1], p.shape[2:].numel()
    CHANNELS = triton.next_power_of_2(max(C, 1))
    grid = LatentGrid("transition_loss", p, positions, CHANNELS)
    rate = 0.5 / epsilon if epsilon is not None and dF is not None else 1.0
    trailing = 0 if dF is None else len(dF) // (1 if epsilon is None else 2)
    per = 1 / max(1, C * positions), 1 / max(1, positions)
    return grid, dict(C=C, CHANNELS=CHANNELS, EPS=EPS), p.shape[0] - trailing, (rate, *per)


def _views(args: tuple, first: int) -> list:
    """The prediction, which is argument `first`, x and z; F_+ and F_−, None where F_+ is D itself;
    F_cond and F_uncond, and the five coefficients."""
    dF, epsilon = args[first + 8], args[first + 9]
    (plus,) = view_latents(args, first + 8)
    minus = [None, 0]
    if dF is not None and epsilon is not None:
        half, copy = dF.shape[0] // 2, plus.change
        minus = [plus._replace(change=_part(copy, half, 2 * half))]
        plus = plus._replace(change=_part(copy, 0, half))
    return [
        *view_latents(args, *range(first, first + 3)), plus, *minus,
        *view_latents(args, first + 10, first + 11),
        *view_vectors(args, *range(first + 3, first + 8)),
    ]  # fmt: skip


def _part(copy, start: int, stop: int):
    return lambda dF: (dF if copy is None else copy(dF))[start:stop]


def _terms(args: tuple, *tangent):
    """The two terms, or their derivative along a tangent of the prediction."""
    p, dF, epsilon = args[0], args[8], args[9]
    grid, constants, skipped, numbers = _plan(p, dF, epsilon)
    grid.spread()
    if p.numel() == 0:  # the mean of nothing
        samples = p.shape[0]
        return lambda p, *_: p.new_full((2, samples), float("nan"), dtype=torch.float32)
    return grid.launch(
        _transition_loss_forward_kernel,
        (grid.tiles, skipped, *_views(args, 0), *numbers, *tangent, Out(0)),
        (Made((2, grid.samples, grid.programs), torch.float32),), args,
        finish=lambda partial: partial.sum(2) if partial.shape[2] > 1 else partial.squeeze(2),
        **constants,
    )  # fmt: skip


def forward(*args):
    """(2, B): the squared and the cosine term of each sample."""
    return _terms(args, None, 0)


def jvp(*args):
    """The derivative of `forward` along a tangent of the prediction."""
    if args[12] is None:
        return lambda p, *_: p.new_zeros((2, p.shape[0]), dtype=torch.float32)
    return _terms(args, *view_latents(args, 12))


def backward(*args):
    """The gradient of the prediction."""
    p, dF, epsilon = args[2], args[10], args[11]
    grid, constants, skipped, numbers = _plan(p, dF, epsilon)
    return grid.launch(
        _transition_loss_backward_kernel,
        (*view_vectors(args, 0, 1), skipped, *_views(args, 2), *numbers, Out(0)),
        (like(p),), args, **constants,
    )  # fmt: skip
