"""Launchers of csrc/transition_loss.cu, as triton.py's; tangents are Triton's."""

import torch

from ..dispatch import extension
from ..launch.dense import Reader, one_dtype, tokens_per_block
from ..launch.views import view_latents, view_vector

STEP = 4096  # elements that a block has at a time, if teams have the channels
TEAMS = 4, 8, 16, 32  # channels
POSITIONS = 128  # a block has at a time, with any other number of channels
BLOCKS = 3  # that a multiprocessor holds


def _reader(prediction, x, z, coefficients, dF, F_cond, F_uncond, gradients=()) -> Reader:
    """Networks in one dtype, data and noise in the same or float32, the rest in float32."""
    dtype = one_dtype(prediction, dF, F_cond, F_uncond)
    is_same = x.dtype == z.dtype == dtype
    latents = [(y, dtype if is_same else torch.float32) for y in (x, z)]
    latents = [(prediction, dtype), *latents, *((y, dtype) for y in (dF, F_cond, F_uncond))]
    vectors = (*coefficients, *gradients)
    return Reader(
        *((y, dtype, view_latents(y)) for y, dtype in latents),
        *((c, torch.float32, view_vector(c)) for c in vectors),
    )


def _inputs(read, prediction, x, z, *rest):
    """What csrc takes, and the gradients of the terms."""
    *coefficients, dF, epsilon, F_cond, F_uncond = rest[:9]
    tensors = read(prediction, x, z, dF, F_cond, F_uncond, *coefficients, *rest[9:])
    matrices = [None if y is None else y.flatten(1) for y in tensors[:6]]
    *state, dF, F_cond, F_uncond = matrices
    later, earlier = (dF, None) if dF is None or epsilon is None else dF.chunk(2)
    if later is not None and later.shape[0] == 0:
        later = earlier = None
    rate = 1.0 if epsilon is None else 0.5 / epsilon
    inputs = *state, *tensors[6:11], later, earlier, rate, F_cond, F_uncond
    return inputs, tensors[11:]


def forward(prediction, x, z, *rest):
    """(2, B): the squared and the cosine term of each sample."""
    *coefficients, dF, _, F_cond, F_uncond = rest
    read = _reader(prediction, x, z, coefficients, dF, F_cond, F_uncond)
    samples, C = prediction.shape[:2]
    length = prediction.shape[2:].numel()
    step = STEP // C if C in TEAMS else POSITIONS
    positions = tokens_per_block(prediction, samples, length, BLOCKS, length, step)
    shape = 2, samples, -(-length // positions)
    launch = extension.ops().transition_loss_forward.default

    def run(prediction, *target):
        if prediction.numel() == 0:  # the mean of nothing
            return prediction.new_full(shape[:2], float("nan"), dtype=torch.float32)
        inputs, _ = _inputs(read, prediction, *target)
        partial = torch.empty(shape, dtype=torch.float32, device=prediction.device)
        launch(*inputs, partial, C, positions)
        return partial.sum(2) if shape[2] > 1 else partial.squeeze(2)

    return run


def backward(d_squared, d_cosine, prediction, x, z, *rest):
    """The gradient of the prediction."""
    *coefficients, dF, _, F_cond, F_uncond = rest
    gradients = d_squared, d_cosine
    read = _reader(prediction, x, z, coefficients, dF, F_cond, F_uncond, gradients)
    launch = extension.ops().transition_loss_backward.default

    def run(d_squared, d_cosine, prediction, *target):
        inputs, gradients = _inputs(read, prediction, *target, d_squared, d_cosine)
        out = inputs[0].new_empty(prediction.shape)
        if out.numel():
            launch(*gradients, *inputs, out, prediction.shape[1])
        return out.to(prediction.dtype)

    return run
