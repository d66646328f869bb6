"""Launchers of csrc/transition_step.cu, as triton.py's; tangents are Triton's."""

import torch

from ..dispatch import extension
from ..launch.calls import Made, Out
from ..launch.dense import blocks_per_sample, call, one_dtype, read_as
from ..launch.views import view_latents, view_vectors


def _read(args: tuple, x: int) -> tuple[list[torch.dtype], list]:
    """The dtypes of state, F_cond, F_uncond and noise, and these and the coefficients, the state
    argument `x`: it is as wide as the network or float32 or float64, the noise is like it, the
    coefficients are float32 or float64."""
    state, network = args[x].dtype, one_dtype(args[x + 1], args[x + 2])
    if state != torch.float64:
        state = state if state == network else torch.float32
        network = torch.float32 if network == torch.float64 else network
    dtypes = [state, network, network, state]
    views = zip(dtypes, view_latents(args, *range(x, x + 4)), strict=True)
    latents = [v for dtype, view in views for v in read_as(dtype, args, [view], flat=True)]
    coefficients = view_vectors(args, *range(x + 4, x + 8))
    wide = torch.promote_types(state, torch.float32)
    return dtypes, [*latents, *read_as(wide, args, coefficients)]


def forward(*args):
    x = args[0]
    dtypes, views = _read(args, 0)
    made = (Made(x.shape, dtypes[0], returned=x.dtype),)
    operator, is_empty = extension.ops().transition_step_forward, x.numel() == 0
    return call(operator, (*views, Out(0)), made, args, is_empty=is_empty)


def backward(*args):
    """(dx, dF_c, dF_u, dn, sums), as triton.py's."""
    x, needs = args[1], args[9]
    dtypes, views = _read(args, 1)
    gradient = read_as(dtypes[0], args, view_latents(args, 0), flat=True)
    blocks = blocks_per_sample(x.shape[1:].numel()) if needs[4] else 0
    made = [
        Made(x.shape, dtype, returned=tensor.dtype) if is_needed else None
        for dtype, tensor, is_needed in zip(dtypes, args[1:5], needs, strict=False)
    ]
    partial = Made((4, x.shape[0], blocks), torch.promote_types(dtypes[0], torch.float32))
    outputs = *map(Out, range(4)), Out(4) if needs[4] else None
    return call(
        extension.ops().transition_step_backward, (*gradient, *views, *outputs),
        (*made, partial), args, finish=lambda *made: (*made[:4], made[4].sum(2)),
        is_empty=x.numel() == 0,
    )  # fmt: skip
