"""Launchers of csrc/transition_inputs.cu, with the arguments of triton.py's; tangents are
Triton's."""

import torch

from ..dispatch.extension import (
    blocks_per_sample,
    dense_samples,
    one_dtype,
    tangents_in_triton,
    vectors,
)


def forward(x, z, *coefficients):
    """(x_t, v_t, x_±), the last two empty without their coefficients."""
    dtype, shape = x.dtype, x.shape[1:]
    x, z = dense_samples(*one_dtype(x, z))
    _, _, d_alpha, _, alpha_pm, _ = coefficients
    made = [
        None if rows is None else x.new_empty((rows.shape[0], *shape))
        for rows in (x, d_alpha, alpha_pm)
    ]
    if x.numel():
        torch.ops.tim_kernels_cuda.transition_inputs_forward(
            x, z, *vectors(torch.float32, *coefficients), *made
        )
    return tuple(x.new_empty(0, dtype=dtype) if y is None else y.to(dtype) for y in made)


def backward(dx_t, dv_t, dx_pm, x, z, coefficients, needs_dx, needs_dz, needs_rows):
    """(dx, dz, rows), as triton.py's."""
    dtypes, shape = (x.dtype, z.dtype), x.shape
    *gradients, x, z = dense_samples(*one_dtype(dx_t, dv_t, dx_pm, x, z))
    made = [x.new_empty(shape) if is_needed else None for is_needed in (needs_dx, needs_dz)]
    blocks = blocks_per_sample(x.shape[1]) if needs_rows else 0
    make = torch.empty if x.numel() else torch.zeros
    partial = make((8, shape[0], blocks), dtype=torch.float32, device=x.device)
    if x.numel():
        torch.ops.tim_kernels_cuda.transition_inputs_backward(
            *gradients, x, z, *vectors(torch.float32, *coefficients), *made,
            partial if needs_rows else None,
        )  # fmt: skip
    dx, dz = (
        x.new_empty(0, dtype=dtype) if d is None else d.to(dtype)
        for d, dtype in zip(made, dtypes, strict=True)
    )
    return dx, dz, partial.sum(2)


jvp = tangents_in_triton("transition_inputs")
