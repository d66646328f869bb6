"""Triton kernels of the network's inputs along a trajectory.

With x, z and the coefficients of each sample, the last three only for trailing samples:

    x_t = α x + σ z    v_t = α' x + σ' z    x_± = α± x + σ± z

The tangent is the same kernel with two pairs, (ẋ, ż) by the coefficients and (x, z) by theirs.
"""

import torch
import triton
import triton.language as tl

from ..launch.grid import kernel
from ..launch.latents import LatentGrid, load, locate, scaled, store
from ..launch.views import POINTER, view_latents, view_vector


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


def _mixes(like, pair, coefficients, second=(None, None), tangents=(None,) * 6):
    """(x_t, v_t, x_±) of x and z; their tangents where `second` and `tangents` are given."""
    _, _, d_alpha, _, alpha_pm, _ = coefficients
    launch = LatentGrid("transition_inputs", like, like.shape[1:].numel()).launch(
        _transition_inputs_forward_kernel, *_trailing(like, d_alpha, alpha_pm),
        *map(view_latents, pair), *map(view_vector, coefficients),
        *map(view_latents, second), *map(view_vector, tangents), POINTER, POINTER, POINTER,
    )  # fmt: skip
    shape = like.shape[1:]
    leading = [None if rows is None else len(rows) for rows in (like, d_alpha, alpha_pm)]

    def run(like, *tensors):
        made = [like.new_empty(0 if n is None else (n, *shape)) for n in leading]
        stored = (None if n is None else out for n, out in zip(leading, made, strict=True))
        launch(*tensors, *stored)
        return tuple(made)

    return run


def forward(x, z, *coefficients):
    """(x_t, v_t, x_±), the last two empty without their coefficients."""
    mixes, none = _mixes(x, (x, z), coefficients), (None,) * 8
    return lambda x, *rest: mixes(x, x, *rest, *none)


def jvp(x, z, *coefficients_and_tangents):
    """Tangents of (x_t, v_t, x_±); a tangent that is None is zero."""
    coefficients, (tx, tz, *tangents) = _split(coefficients_and_tangents)
    is_read = any(tangent is not None for tangent in tangents)
    second = (x, z) if is_read else (None, None)
    mixes = _mixes(x, (tx, tz), coefficients, second, tangents)

    def run(x, z, *rest):
        coefficients, (tx, tz, *tangents) = _split(rest)
        second = (x, z) if is_read else (None, None)
        return mixes(x, tx, tz, *coefficients, *second, *tangents)

    return run


def _split(rest):
    return rest[:6], rest[6:]


def backward(dx_t, dv_t, dx_pm, x, z, *coefficients_and_needs):
    """(dx, dz, sums), what is not needed being empty: sums is float32 (8, B), the gradients of
    (α, σ), (α', σ'), (α₊, σ₊) and (α₋, σ₋); x and z are read only for it."""
    coefficients, (needs_dx, needs_dz, needs_sums) = _split(coefficients_and_needs)
    grid = LatentGrid("transition_inputs", x, x.shape[1:].numel())
    inputs = (x, z) if needs_sums else (None, None)
    launch = grid.launch(
        _transition_inputs_backward_kernel, *_trailing(x, coefficients[2], coefficients[4]),
        *map(view_latents, (dx_t, dv_t, dx_pm, *inputs)), *map(view_vector, coefficients),
        POINTER, POINTER, POINTER,
    )  # fmt: skip
    shape = 8, grid.samples, grid.programs if needs_sums else 0

    def run(dx_t, dv_t, dx_pm, x, z, *rest):
        dx = x.new_empty(x.shape if needs_dx else 0)
        dz = z.new_empty(z.shape if needs_dz else 0)
        partial = x.new_zeros(shape, dtype=torch.float32)
        launch(
            dx_t, dv_t, dx_pm, *((x, z) if needs_sums else (None, None)), *rest[:6],
            dx if needs_dx else None, dz if needs_dz else None, partial if needs_sums else None,
        )  # fmt: skip
        return dx, dz, partial.sum(2)

    return run
