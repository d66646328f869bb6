"""Launchers of csrc/transition_step.cu, with the arguments of triton.py's; tangents are
Triton's."""

import torch

from ..dispatch.extension import (
    blocks_per_sample,
    dense_samples,
    one_dtype,
    tangents_in_triton,
    vectors,
)


def _inputs(x, f_cond, f_uncond, noise, *coefficients):
    """State, network, noise and coefficients as the kernels take them: the state is as wide as
    the network or float32 or float64, the noise is like the state."""
    f_cond, f_uncond = one_dtype(f_cond, f_uncond)
    if x.dtype != torch.float64:
        if f_cond.dtype != x.dtype:
            x = x.float()
        if f_cond.dtype == torch.float64:
            f_cond, f_uncond = f_cond.float(), None if f_uncond is None else f_uncond.float()
    noise = None if noise is None else noise.to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    return *dense_samples(x, f_cond, f_uncond, noise), *vectors(wide, *coefficients)


def forward(x, f_cond, f_uncond, noise, guidance, a, b, c):
    dtype, shape = x.dtype, x.shape
    arguments = _inputs(x, f_cond, f_uncond, noise, guidance, a, b, c)
    out = arguments[0].new_empty(shape)
    if out.numel():
        torch.ops.tim_kernels_cuda.transition_step_forward(*arguments, out)
    return out.to(dtype)


def backward(d, x, f_cond, f_uncond, noise, guidance, a, b, c, needs):
    """(dx, dF_c, dF_u, dn, rows), as triton.py's."""
    tensors, shape = (x, f_cond, f_uncond, noise), x.shape
    arguments = _inputs(*tensors, guidance, a, b, c)
    state = arguments[0]
    made = [
        torch.empty(shape, dtype=tensor.dtype, device=x.device) if is_needed else None
        for tensor, is_needed in zip(arguments[:4], needs, strict=False)
    ]
    wide = torch.promote_types(state.dtype, torch.float32)
    blocks = blocks_per_sample(state.shape[1]) if needs[4] else 0
    make = torch.empty if x.numel() else torch.zeros
    partial = make((4, shape[0], blocks), dtype=wide, device=x.device)
    if x.numel():
        (d,) = dense_samples(d.to(state.dtype))
        torch.ops.tim_kernels_cuda.transition_step_backward(
            d, *arguments, *made, partial if needs[4] else None
        )
    gradients = (
        x.new_empty(0) if gradient is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(made, tensors, strict=True)
    )
    return *gradients, partial.sum(2)


jvp = tangents_in_triton("transition_step")
