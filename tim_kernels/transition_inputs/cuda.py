"""Launchers of csrc/transition_inputs.cu, as triton.py's; tangents are Triton's."""

import torch

from ..dispatch import extension
from ..launch.dense import Reader, blocks_per_sample, one_dtype
from ..launch.views import view_latents, view_vector


def _reader(latents, coefficients) -> Reader:
    """Latents in one dtype, coefficients in float32."""
    dtype = one_dtype(*latents)
    return Reader(
        *((x, dtype, view_latents(x)) for x in latents),
        *((c, torch.float32, view_vector(c)) for c in coefficients),
    )


def _matrices(latents):
    return [None if x is None else x.flatten(1) for x in latents]


def forward(x, z, *coefficients):
    """(x_t, v_t, x_±), the last two empty without their coefficients."""
    read, shape = _reader((x, z), coefficients), x.shape[1:]
    _, _, d_alpha, _, alpha_pm, _ = coefficients
    leading = [None if rows is None else len(rows) for rows in (x, d_alpha, alpha_pm)]
    launch = extension.ops().transition_inputs_forward.default

    def run(x, z, *coefficients):
        dtype = x.dtype
        x, z, *coefficients = read(x, z, *coefficients)
        made = [None if n is None else x.new_empty((n, *shape)) for n in leading]
        if x.numel():
            launch(*_matrices((x, z)), *coefficients, *made)
        return tuple(x.new_empty(0, dtype=dtype) if y is None else y.to(dtype) for y in made)

    return run


def backward(dx_t, dv_t, dx_pm, x, z, *coefficients_and_needs):
    """(dx, dz, sums), as triton.py's."""
    *coefficients, needs_dx, needs_dz, needs_sums = coefficients_and_needs
    read = _reader((dx_t, dv_t, dx_pm, x, z), coefficients)
    blocks = blocks_per_sample(x.shape[1:].numel()) if needs_sums else 0
    make = torch.empty if x.numel() else torch.zeros
    shape = 8, x.shape[0], blocks
    launch = extension.ops().transition_inputs_backward.default

    def run(dx_t, dv_t, dx_pm, x, z, *coefficients_and_needs):
        dtypes = x.dtype, z.dtype
        tensors = read(dx_t, dv_t, dx_pm, x, z, *coefficients_and_needs[:6])
        *gradients, x, z = tensors[:5]
        made = [x.new_empty(x.shape) if needed else None for needed in (needs_dx, needs_dz)]
        partial = make(shape, dtype=torch.float32, device=x.device)
        if x.numel():
            sums = partial if needs_sums else None
            launch(*_matrices((*gradients, x, z)), *tensors[5:], *made, sums)
        dx, dz = (
            x.new_empty(0, dtype=dtype) if d is None else d.to(dtype)
            for d, dtype in zip(made, dtypes, strict=True)
        )
        return dx, dz, partial.sum(2)

    return run
