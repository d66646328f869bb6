"""Launchers of csrc/transition_inputs.cu, as triton.py's; tangents are Triton's."""

import torch

from ..dispatch import extension
from ..launch.calls import Made, Out
from ..launch.dense import blocks_per_sample, call, made_as, one_dtype, read_as
from ..launch.views import view_latents, view_vectors


def forward(*args):
    """(x_t, v_t, x_±), the last two empty without their coefficients."""
    x, z, _, _, d_alpha, _, alpha_pm, _ = args
    dtype = one_dtype(x, z)
    made = [
        None if rows is None else Made((len(rows), *x.shape[1:]), dtype, returned=x.dtype)
        for rows in (x, d_alpha, alpha_pm)
    ]
    return call(
        extension.ops().transition_inputs_forward,
        (*read_as(dtype, args, view_latents(args, 0, 1), flat=True),
         *read_as(torch.float32, args, view_vectors(args, *range(2, 8))), *map(Out, range(3))),
        made, args, is_empty=x.numel() == 0,
    )  # fmt: skip


def backward(*args):
    """(dx, dz, sums), as triton.py's."""
    *latents, _, _, _, _, _, _, needs_dx, needs_dz, needs_sums = args
    x, z = latents[3:]
    dtype = one_dtype(*latents)
    blocks = blocks_per_sample(x.shape[1:].numel()) if needs_sums else 0
    return call(
        extension.ops().transition_inputs_backward,
        (*read_as(dtype, args, view_latents(args, *range(5)), flat=True),
         *read_as(torch.float32, args, view_vectors(args, *range(5, 11))),
         Out(0), Out(1), Out(2) if needs_sums else None),
        (made_as(dtype, x) if needs_dx else None, made_as(dtype, z) if needs_dz else None,
         Made((8, x.shape[0], blocks), torch.float32)),
        args, finish=lambda dx, dz, partial: (dx, dz, partial.sum(2)), is_empty=x.numel() == 0,
    )  # fmt: skip
