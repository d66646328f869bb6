"""Launchers of csrc/transition_loss.cu, with the arguments of triton.py's; tangents are
Triton's."""

import torch

from ..dispatch.extension import (
    dense_samples,
    one_dtype,
    tangents_in_triton,
    tokens_per_block,
    vectors,
)

STEP = 4096  # elements that a block has at a time, if teams have the channels
TEAMS = 4, 8, 16, 32  # channels
POSITIONS = 128  # a block has at a time, with any other number of channels
BLOCKS = 3  # that a multiprocessor holds


def _inputs(prediction, x, z, coefficients, dF, epsilon, F_cond, F_uncond):
    """The prediction and then the others as the kernels take them: networks of one dtype, data
    and noise of the same or float32."""
    prediction, dF, F_cond, F_uncond = one_dtype(prediction, dF, F_cond, F_uncond)
    if x.dtype != prediction.dtype or z.dtype != prediction.dtype:
        x, z = x.float(), z.float()
    prediction, x, z, dF, F_cond, F_uncond = dense_samples(prediction, x, z, dF, F_cond, F_uncond)
    later, earlier = (dF, None) if dF is None or epsilon is None else dF.chunk(2)
    if later is not None and later.shape[0] == 0:
        later = earlier = None
    rate = 1.0 if epsilon is None else 0.5 / epsilon
    coefficients = vectors(torch.float32, *coefficients)
    return prediction, x, z, *coefficients, later, earlier, rate, F_cond, F_uncond


def forward(prediction, *target):
    """(2, B): the squared and the cosine term of each sample."""
    samples, C = prediction.shape[:2]
    if prediction.numel() == 0:  # the mean of nothing
        return prediction.new_full((2, samples), float("nan"), dtype=torch.float32)
    length = prediction[0, 0].numel()
    step = STEP // C if C in TEAMS else POSITIONS
    positions = tokens_per_block(prediction, samples, length, BLOCKS, length, step)
    shape = (2, samples, -(-length // positions))
    partial = torch.empty(shape, dtype=torch.float32, device=prediction.device)
    torch.ops.tim_kernels_cuda.transition_loss_forward(
        *_inputs(prediction, *target), partial, C, positions
    )
    return partial.sum(2) if shape[2] > 1 else partial.squeeze(2)


def backward(d_squared, d_cosine, prediction, *target):
    """The gradient of the prediction."""
    inputs = _inputs(prediction, *target)
    out = inputs[0].new_empty(prediction.shape)
    if out.numel():
        gradients = vectors(torch.float32, d_squared, d_cosine)
        torch.ops.tim_kernels_cuda.transition_loss_backward(
            *gradients, *inputs, out, prediction.shape[1]
        )
    return out.to(prediction.dtype)


jvp = tangents_in_triton("transition_loss")
