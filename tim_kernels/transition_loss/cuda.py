"""Launchers of csrc/transition_loss.cu, as triton.py's; tangents are Triton's."""

import torch

from ..dispatch import extension
from ..launch.calls import Made, Out
from ..launch.dense import call, made_as, one_dtype, read_as, tokens_per_block
from ..launch.views import view_latents, view_vectors

STEP = 4096  # elements that a block has at a time, if teams have the channels
TEAMS = 4, 8, 16, 32  # channels
POSITIONS = 128  # a block has at a time, with any other number of channels
BLOCKS = 3  # that a multiprocessor holds


def _read(args: tuple, first: int) -> tuple[torch.dtype, list]:
    """The dtype of the networks, and what csrc takes from the prediction, argument `first`, to
    F_uncond: networks in one dtype, data and noise in the same or float32, coefficients in
    float32."""
    at = dict(p=first, x=first + 1, z=first + 2, dF=first + 8, cond=first + 10, uncond=first + 11)
    p, x, z, dF, cond, uncond = (args[i] for i in at.values())
    epsilon = args[first + 9]
    dtype = one_dtype(p, dF, cond, uncond)
    data = dtype if x.dtype == z.dtype == dtype else torch.float32

    def read(dtype, *names):
        return read_as(dtype, args, view_latents(args, *(at[n] for n in names)), flat=True)

    later, earlier = *read(dtype, "dF"), None
    if dF is not None and len(dF) == 0:
        later = None
    elif dF is not None and epsilon is not None:
        later, earlier = (later._replace(change=_half(later.change, i)) for i in (0, 1))
    rate = 1.0 if epsilon is None else 0.5 / epsilon
    coefficients = view_vectors(args, *range(first + 3, first + 8))
    return dtype, [
        *read(dtype, "p"), *read(data, "x", "z"), *read_as(torch.float32, args, coefficients),
        later, earlier, rate, *read(dtype, "cond", "uncond"),
    ]  # fmt: skip


def _half(change, half: int):
    return lambda dF: change(dF).chunk(2)[half]


def forward(*args):
    """(2, B): the squared and the cosine term of each sample."""
    p = args[0]
    samples, C = p.shape[:2]
    if p.numel() == 0:  # the mean of nothing
        return lambda p, *_: p.new_full((2, samples), float("nan"), dtype=torch.float32)
    length = p.shape[2:].numel()
    step = STEP // C if C in TEAMS else POSITIONS
    positions = tokens_per_block(p, samples, length, BLOCKS, length, step)
    _, views = _read(args, 0)
    return call(
        extension.ops().transition_loss_forward, (*views, Out(0), C, positions),
        (Made((2, samples, -(-length // positions)), torch.float32),), args,
        finish=lambda partial: partial.sum(2) if partial.shape[2] > 1 else partial.squeeze(2),
    )  # fmt: skip


def backward(*args):
    """The gradient of the prediction."""
    p = args[2]
    dtype, views = _read(args, 2)
    gradients = read_as(torch.float32, args, view_vectors(args, 0, 1))
    return call(
        extension.ops().transition_loss_backward, (*gradients, *views, Out(0), p.shape[1]),
        (made_as(dtype, p),), args, is_empty=p.numel() == 0,
    )  # fmt: skip
