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

from ..launch.grid import kernel
from ..launch.latents import LatentGrid, load, scaled
from ..launch.views import POINTER, view_latents, view_vector
from .reference import EPS


@triton.jit
def _load_target(
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
        t = _load_target(
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
    t = _load_target(
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


def _sides(dF, epsilon):
    """F_+ and F_−, which is None where F_+ is D itself."""
    if dF is None or epsilon is None:
        return dF, None
    half = dF.shape[0] // 2
    return dF[:half], dF[half:]


def _plan(p, dF, epsilon):
    """The grid, constants, and numbers of a loss over latents p (B, C, …): 1/2ε, how many leading
    samples have no derivative, and one over the elements and the positions of a sample."""
    C, positions = p.shape[1], p.shape[2:].numel()
    CHANNELS = triton.next_power_of_2(max(C, 1))
    grid = LatentGrid("transition_loss", p, positions, CHANNELS)
    rate = 0.5 / epsilon if epsilon is not None and dF is not None else 1.0
    trailing = 0 if dF is None else len(dF) // (1 if epsilon is None else 2)
    per = 1 / max(1, C * positions), 1 / max(1, positions)
    return grid, dict(C=C, CHANNELS=CHANNELS, EPS=EPS), rate, p.shape[0] - trailing, per


def _views(p, x, z, coefficients, dF, epsilon, F_cond, F_uncond):
    tensors = p, x, z, *_sides(dF, epsilon), F_cond, F_uncond
    return *map(view_latents, tensors), *map(view_vector, coefficients)


def _terms(p, target, tangent=None):
    """The two terms, or their derivative along a tangent of the prediction."""
    _, _, _, dF, epsilon, _, _ = target
    grid, constants, rate, skipped, per = _plan(p, dF, epsilon)
    grid.spread()
    shape = 2, grid.samples, grid.programs
    launch = grid.launch(
        _transition_loss_forward_kernel, grid.tiles, skipped, *_views(p, *target), rate, *per,
        view_latents(tangent), POINTER, **constants,
    )  # fmt: skip

    def run(p, target, tangent=None):
        if launch.is_empty:  # the mean of nothing
            return p.new_full(shape[:2], float("nan"), dtype=torch.float32)
        partial = p.new_empty(shape, dtype=torch.float32)
        x, z, coefficients, dF, epsilon, F_cond, F_uncond = target
        tensors = p, x, z, *_sides(dF, epsilon), F_cond, F_uncond, *coefficients
        launch(*tensors, tangent, partial)
        return partial.sum(2) if shape[2] > 1 else partial.squeeze(2)

    return run


def _target(x, z, a_x, a_z, a_D, a_cond, a_uncond, dF, epsilon, F_cond, F_uncond):
    return x, z, (a_x, a_z, a_D, a_cond, a_uncond), dF, epsilon, F_cond, F_uncond


def forward(prediction, *target):
    """(2, B): the squared and the cosine term of each sample."""
    terms = _terms(prediction, _target(*target))
    return lambda prediction, *target: terms(prediction, _target(*target))


def jvp(prediction, *target_and_tangent):
    """The derivative of `forward` along a tangent of the prediction."""
    *target, tangent = target_and_tangent
    terms = _terms(prediction, _target(*target), tangent)

    def run(prediction, *target_and_tangent):
        *target, tangent = target_and_tangent
        return terms(prediction, _target(*target), tangent)

    return run


def backward(d_squared, d_cosine, prediction, *target):
    """The gradient of the prediction."""
    target = _target(*target)
    _, _, _, dF, epsilon, _, _ = target
    grid, constants, rate, skipped, per = _plan(prediction, dF, epsilon)
    launch = grid.launch(
        _transition_loss_backward_kernel, view_vector(d_squared), view_vector(d_cosine), skipped,
        *_views(prediction, *target), rate, *per, POINTER, **constants,
    )  # fmt: skip

    def run(d_squared, d_cosine, prediction, *target):
        x, z, coefficients, dF, epsilon, F_cond, F_uncond = _target(*target)
        tensors = prediction, x, z, *_sides(dF, epsilon), F_cond, F_uncond, *coefficients
        out = prediction.new_empty(prediction.shape)
        launch(d_squared, d_cosine, *tensors, out)
        return out

    return run
