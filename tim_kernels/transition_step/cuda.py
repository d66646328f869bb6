"""Launchers of csrc/transition_step.cu, as triton.py's; tangents are Triton's."""

import torch

from ..dispatch import extension
from ..launch.dense import Reader, blocks_per_sample, one_dtype
from ..launch.views import view_latents, view_vector


def _reader(x, f_cond, f_uncond, noise, coefficients, d=None) -> tuple[Reader, torch.dtype]:
    """The state is as wide as the network or float32 or float64, noise and gradient are like the
    state, the coefficients float32 or float64. Also the coefficients' dtype."""
    dtype = one_dtype(f_cond, f_uncond)
    state = x.dtype
    if state != torch.float64:
        state = state if state == dtype else torch.float32
        dtype = torch.float32 if dtype == torch.float64 else dtype
    wide = torch.promote_types(state, torch.float32)
    latents = (x, state), (f_cond, dtype), (f_uncond, dtype), (noise, state), (d, state)
    read = Reader(
        *((y, dtype, view_latents(y)) for y, dtype in latents),
        *((c, wide, view_vector(c)) for c in coefficients),
    )
    return read, wide


def _matrices(latents):
    return [None if y is None else y.flatten(1) for y in latents]


def forward(x, f_cond, f_uncond, noise, *coefficients):
    read, _ = _reader(x, f_cond, f_uncond, noise, coefficients)
    launch = extension.ops().transition_step_forward.default

    def run(x, f_cond, f_uncond, noise, *coefficients):
        dtype = x.dtype
        tensors = read(x, f_cond, f_uncond, noise, None, *coefficients)
        out = tensors[0].new_empty(x.shape)
        if out.numel():
            launch(*_matrices(tensors[:4]), *tensors[5:], out)
        return out.to(dtype)

    return run


def backward(d, x, f_cond, f_uncond, noise, guidance, a, b, c, needs):
    """(dx, dF_c, dF_u, dn, sums), as triton.py's."""
    read, wide = _reader(x, f_cond, f_uncond, noise, (guidance, a, b, c), d)
    blocks = blocks_per_sample(x.shape[1:].numel()) if needs[4] else 0
    make = torch.empty if x.numel() else torch.zeros
    shape = 4, x.shape[0], blocks
    launch = extension.ops().transition_step_backward.default

    def run(d, x, f_cond, f_uncond, noise, guidance, a, b, c, needs):
        own = x, f_cond, f_uncond, noise
        *latents, d, guidance, a, b, c = read(*own, d, guidance, a, b, c)
        made = [
            tensor.new_empty(x.shape) if is_needed else None
            for tensor, is_needed in zip(latents, needs, strict=False)
        ]
        partial = make(shape, dtype=wide, device=x.device)
        if x.numel():
            sums = partial if needs[4] else None
            launch(d.flatten(1), *_matrices(latents), guidance, a, b, c, *made, sums)
        gradients = (
            x.new_empty(0) if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(made, own, strict=True)
        )
        return *gradients, partial.sum(2)

    return run
