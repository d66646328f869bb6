"""Triton kernels of a guided step of the sampler.

    F = F_u + g (F_c − F_u)    x_r = a x + b F + c n

without F_u, F = F_c. All in the state's precision: WIDE is float64 if the state is, else float32.
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
def _guided(f_cond, f_uncond, has_uncond: tl.constexpr, guidance, sample):
    if has_uncond:
        return f_uncond + scaled(guidance, sample, f_cond - f_uncond)
    else:
        return f_cond


@kernel
def _transition_step_forward_kernel(
    length, programs,
    x_ptr, x_b, f_cond_ptr, f_cond_b, f_uncond_ptr, f_uncond_b, noise_ptr, noise_b,
    guidance, a, b, c, out_ptr,
    WIDE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, offset, mask = locate(length, programs, ALIGN, BLOCK)
    x = load(x_ptr, sample, x_b, offset, mask, ALIGN, WIDE)
    f_cond = load(f_cond_ptr, sample, f_cond_b, offset, mask, ALIGN, WIDE)
    f_uncond = load(f_uncond_ptr, sample, f_uncond_b, offset, mask, ALIGN, WIDE)
    f = _guided(f_cond, f_uncond, f_uncond_ptr is not None, guidance, sample)
    out = scaled(a, sample, x) + scaled(b, sample, f)
    if noise_ptr is not None:
        noise = load(noise_ptr, sample, noise_b, offset, mask, ALIGN, WIDE)
        out += scaled(c, sample, noise)
    store(out_ptr, sample, length, offset, mask, out, ALIGN)


@kernel
def _transition_step_jvp_kernel(
    length, programs,
    x_ptr, x_b, f_cond_ptr, f_cond_b, f_uncond_ptr, f_uncond_b, noise_ptr, noise_b,
    guidance, a, b, c,
    tx_ptr, tx_b, tf_cond_ptr, tf_cond_b, tf_uncond_ptr, tf_uncond_b, tnoise_ptr, tnoise_b,
    tguidance, ta, tb, tc, out_ptr,
    WIDE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, offset, mask = locate(length, programs, ALIGN, BLOCK)
    x = load(x_ptr, sample, x_b, offset, mask, ALIGN, WIDE)
    f_cond = load(f_cond_ptr, sample, f_cond_b, offset, mask, ALIGN, WIDE)
    f_uncond = load(f_uncond_ptr, sample, f_uncond_b, offset, mask, ALIGN, WIDE)
    noise = load(noise_ptr, sample, noise_b, offset, mask, ALIGN, WIDE)
    tx = load(tx_ptr, sample, tx_b, offset, mask, ALIGN, WIDE)
    tf_cond = load(tf_cond_ptr, sample, tf_cond_b, offset, mask, ALIGN, WIDE)
    tf_uncond = load(tf_uncond_ptr, sample, tf_uncond_b, offset, mask, ALIGN, WIDE)
    tnoise = load(tnoise_ptr, sample, tnoise_b, offset, mask, ALIGN, WIDE)
    has_uncond: tl.constexpr = guidance is not None
    f = _guided(f_cond, f_uncond, has_uncond, guidance, sample)
    tf = _guided(tf_cond, tf_uncond, has_uncond, guidance, sample)
    tf += scaled(tguidance, sample, f_cond - f_uncond)
    out = scaled(ta, sample, x) + scaled(tb, sample, f) + scaled(tc, sample, noise)
    out += scaled(a, sample, tx) + scaled(b, sample, tf)
    out += scaled(c, sample, tnoise)
    store(out_ptr, sample, length, offset, mask, out, ALIGN)


@kernel
def _transition_step_backward_kernel(
    length, programs, d_ptr, d_b,
    x_ptr, x_b, f_cond_ptr, f_cond_b, f_uncond_ptr, f_uncond_b, noise_ptr, noise_b,
    guidance, a, b, c, dx_ptr, df_cond_ptr, df_uncond_ptr, dnoise_ptr, partial_ptr,
    WIDE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, offset, mask = locate(length, programs, ALIGN, BLOCK)
    d = load(d_ptr, sample, d_b, offset, mask, ALIGN, WIDE)
    store(dx_ptr, sample, length, offset, mask, scaled(a, sample, d), ALIGN)
    store(dnoise_ptr, sample, length, offset, mask, scaled(c, sample, d), ALIGN)
    df = scaled(b, sample, d)
    if guidance is None:
        store(df_cond_ptr, sample, length, offset, mask, df, ALIGN)
    else:
        df_cond = scaled(guidance, sample, df)
        store(df_cond_ptr, sample, length, offset, mask, df_cond, ALIGN)
        store(df_uncond_ptr, sample, length, offset, mask, df - df_cond, ALIGN)
    if partial_ptr is not None:  # (4, programs) for a, b, c, guidance
        x = load(x_ptr, sample, x_b, offset, mask, ALIGN, WIDE)
        f_cond = load(f_cond_ptr, sample, f_cond_b, offset, mask, ALIGN, WIDE)
        f_uncond = load(f_uncond_ptr, sample, f_uncond_b, offset, mask, ALIGN, WIDE)
        noise = load(noise_ptr, sample, noise_b, offset, mask, ALIGN, WIDE)
        f = _guided(f_cond, f_uncond, guidance is not None, guidance, sample)
        partial_ptr += tl.program_id(0)
        step = tl.num_programs(0).to(tl.int64)
        tl.store(partial_ptr, tl.sum(d * x, 0))
        tl.store(partial_ptr + step, tl.sum(d * f, 0))
        tl.store(partial_ptr + 2 * step, tl.sum(d * noise, 0))
        tl.store(partial_ptr + 3 * step, tl.sum(df * (f_cond - f_uncond), 0))


def _plan(x):
    """The grid over a state x, and the constant of its precision."""
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    return LatentGrid("transition_step", x, x.shape[1:].numel()), dict(WIDE=wide)


def forward(*args):
    """x_r from the state, F_cond, F_uncond, the noise, and guidance, a, b, c."""
    grid, constants = _plan(args[0])
    views = *view_latents(args, *range(4)), *view_vectors(args, *range(4, 8))
    function = _transition_step_forward_kernel
    return grid.launch(function, (*views, Out(0)), (like(args[0]),), args, **constants)


def jvp(*args):
    """The tangent of x_r; a tangent that is None is zero."""
    *_, tguidance, ta, tb, tc = args
    is_f_read = tb is not None or tguidance is not None
    is_read = ta is not None, is_f_read, is_f_read, tc is not None
    inputs = [
        n for i, read in enumerate(is_read) for n in (view_latents(args, i) if read else NO_LATENTS)
    ]
    grid, constants = _plan(args[0])
    views = (
        *inputs, *view_vectors(args, *range(4, 8)), *view_latents(args, *range(8, 12)),
        *view_vectors(args, *range(12, 16)),
    )  # fmt: skip
    function = _transition_step_jvp_kernel
    return grid.launch(function, (*views, Out(0)), (like(args[0]),), args, **constants)


def backward(*args):
    """(dx, dF_c, dF_u, dn, sums), empty what is not needed; sums is (4, B) for a, b, c and g in
    the state's precision, and the only one that reads the inputs."""
    _, *tensors, _, _, _, _, needs = args
    x = tensors[0]
    grid, constants = _plan(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    made = [like(t, needed or None) for t, needed in zip(tensors, needs, strict=False)]
    partial = Made((4, grid.samples, grid.programs if needs[4] else 0), wide, True)
    outputs = *map(Out, range(4)), Out(4) if needs[4] else None
    return grid.launch(
        _transition_step_backward_kernel,
        (*view_latents(args, *range(5)), *view_vectors(args, *range(5, 9)), *outputs),
        (*made, partial), args, finish=lambda *made: (*made[:4], made[4].sum(2)), **constants,
    )  # fmt: skip
