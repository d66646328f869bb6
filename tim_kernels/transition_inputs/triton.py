"""Triton kernels of the network's inputs along a trajectory.

With x, z and the coefficients of each sample, the last three only for trailing samples:

    x_t = α x + σ z    v_t = α' x + σ' z    x_± = α± x + σ± z

The tangent is the same kernel with two pairs, (ẋ, ż) by the coefficients and (x, z) by theirs.
"""

import torch
import triton
import triton.language as tl

from ..launch.calls import Made, Out, like
from ..launch.grid import kernel
from ..launch.latents import LatentGrid, load, locate, scaled, store
from ..launch.views import view_latents, view_vectors

NO_LATENTS = (None, 0)  # a pointer and a stride


@triton.jit
def _mix(a, b, x, z, ta, tb, u, w, row):
    """a x + b z + ta u + tb w with the coefficients of one row."""
    first = scaled(a, row, x) + scaled(b, row, z)
    if ta is None and tb is None:
        return first
    else:
        return first + scaled(ta, row, u) + scaled(tb, row, w)


@kernel
def _transition_inputs_forward_kernel(
    length, programs, skipped, trailing,
    x_ptr, x_b, z_ptr, z_b, alpha, sigma, d_alpha, d_sigma, alpha_pm, sigma_pm,
    u_ptr, u_b, w_ptr, w_b, talpha, tsigma, td_alpha, td_sigma, talpha_pm, tsigma_pm,
    x_t_ptr, v_t_ptr, x_pm_ptr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, offset, mask = locate(length, programs, ALIGN, BLOCK)
    x = load(x_ptr, sample, x_b, offset, mask, ALIGN)
    z = load(z_ptr, sample, z_b, offset, mask, ALIGN)
    u = load(u_ptr, sample, u_b, offset, mask, ALIGN)
    w = load(w_ptr, sample, w_b, offset, mask, ALIGN)
    x_t = _mix(alpha, sigma, x, z, talpha, tsigma, u, w, sample)
    store(x_t_ptr, sample, length, offset, mask, x_t, ALIGN)
    row = sample - skipped
    if row >= 0:
        if v_t_ptr is not None:
            v_t = _mix(d_alpha, d_sigma, x, z, td_alpha, td_sigma, u, w, row)
            store(v_t_ptr, row, length, offset, mask, v_t, ALIGN)
        if x_pm_ptr is not None:
            for side in tl.static_range(2):
                at = row + side * trailing
                x_pm = _mix(alpha_pm, sigma_pm, x, z, talpha_pm, tsigma_pm, u, w, at)
                store(x_pm_ptr, at, length, offset, mask, x_pm, ALIGN)


@triton.jit
def _pull_back(
    d_ptr, d_b, a, b, row, x, z, dx, dz, offset, mask, partial_ptr, output, ALIGN: tl.constexpr
):
    """Add an output's share to dx and dz; write its Σ d·x and Σ d·z to partial (8, programs)."""
    if d_ptr is not None:
        d = load(d_ptr, row, d_b, offset, mask, ALIGN)
        dx += scaled(a, row, d)
        dz += scaled(b, row, d)
        if partial_ptr is not None:
            step = tl.num_programs(0).to(tl.int64)
            partial_ptr += tl.program_id(0) + 2 * output * step
            tl.store(partial_ptr, tl.sum(d * x, 0))
            tl.store(partial_ptr + step, tl.sum(d * z, 0))
    return dx, dz


@kernel
def _transition_inputs_backward_kernel(
    length, programs, skipped, trailing,
    dx_t_ptr, dx_t_b, dv_t_ptr, dv_t_b, dx_pm_ptr, dx_pm_b, x_ptr, x_b, z_ptr, z_b,
    alpha, sigma, d_alpha, d_sigma, alpha_pm, sigma_pm,
    dx_ptr, dz_ptr, partial_ptr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, offset, mask = locate(length, programs, ALIGN, BLOCK)
    x = load(x_ptr, sample, x_b, offset, mask, ALIGN)
    z = load(z_ptr, sample, z_b, offset, mask, ALIGN)
    dx, dz = tl.zeros_like(x), tl.zeros_like(z)
    dx, dz = _pull_back(
        dx_t_ptr, dx_t_b, alpha, sigma, sample, x, z, dx, dz, offset, mask, partial_ptr, 0, ALIGN
    )
    row = sample - skipped
    if row >= 0:
        dx, dz = _pull_back(
            dv_t_ptr, dv_t_b, d_alpha, d_sigma, row, x, z, dx, dz, offset, mask,
            partial_ptr, 1, ALIGN,
        )  # fmt: skip
        for side in tl.static_range(2):
            dx, dz = _pull_back(
                dx_pm_ptr, dx_pm_b, alpha_pm, sigma_pm, row + side * trailing, x, z, dx, dz,
                offset, mask, partial_ptr, 2 + side, ALIGN,
            )  # fmt: skip
    store(dx_ptr, sample, length, offset, mask, dx, ALIGN)
    store(dz_ptr, sample, length, offset, mask, dz, ALIGN)


def _trailing(x, d_alpha, alpha_pm) -> tuple[int, int]:
    """How many leading samples have no derivative, and how many trailing ones have."""
    if d_alpha is not None:
        trailing = d_alpha.shape[0]
    else:
        trailing = 0 if alpha_pm is None else alpha_pm.shape[0] // 2
    return x.shape[0] - trailing, trailing


def _mixes(args: tuple, *views):
    """(x_t, v_t, x_±), the last two empty without their coefficients."""
    x, _, _, _, d_alpha, _, alpha_pm, _ = args[:8]
    made = [
        None if rows is None else Made((len(rows), *x.shape[1:]), x.dtype)
        for rows in (x, d_alpha, alpha_pm)
    ]
    return LatentGrid("transition_inputs", x, x.shape[1:].numel()).launch(
        _transition_inputs_forward_kernel,
        (*_trailing(x, d_alpha, alpha_pm), *views, Out(0), Out(1), Out(2)), made, args,
    )  # fmt: skip


def forward(*args):
    """(x_t, v_t, x_±), the last two empty without their coefficients."""
    nothing = *NO_LATENTS * 2, *[None] * 6
    return _mixes(args, *view_latents(args, 0, 1), *view_vectors(args, *range(2, 8)), *nothing)


def jvp(*args):
    """Tangents of (x_t, v_t, x_±); a tangent that is None is zero."""
    second = view_latents(args, 0, 1)
    if all(tangent is None for tangent in args[10:]):
        second = NO_LATENTS * 2
    tangents = view_vectors(args, *range(10, 16))
    coefficients = view_vectors(args, *range(2, 8))
    return _mixes(args, *view_latents(args, 8, 9), *coefficients, *second, *tangents)


def backward(*args):
    """(dx, dz, sums), what is not needed being empty: sums is float32 (8, B), the gradients of
    (α, σ), (α', σ'), (α₊, σ₊) and (α₋, σ₋); x and z are read only for it."""
    _, _, _, x, z, _, _, d_alpha, _, alpha_pm, _, needs_dx, needs_dz, needs_sums = args
    grid = LatentGrid("transition_inputs", x, x.shape[1:].numel())
    inputs = view_latents(args, 3, 4) if needs_sums else NO_LATENTS * 2
    shape = 8, grid.samples, grid.programs if needs_sums else 0
    return grid.launch(
        _transition_inputs_backward_kernel,
        (*_trailing(x, d_alpha, alpha_pm), *view_latents(args, 0, 1, 2), *inputs,
         *view_vectors(args, *range(5, 11)), Out(0), Out(1), Out(2) if needs_sums else None),
        (like(x, needs_dx or None), like(z, needs_dz or None), Made(shape, torch.float32, True)),
        args, finish=lambda dx, dz, partial: (dx, dz, partial.sum(2)),
    )  # fmt: skip
