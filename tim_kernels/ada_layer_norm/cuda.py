"""Launchers of csrc/ada_layer_norm.cu, with the arguments of triton.py's; tangents are Triton's."""

import torch
from torch import Tensor

from ..dispatch.extension import (
    dense_tokens,
    one_dtype,
    rows_for,
    tangents_in_triton,
    tokens_per_block,
)
from ..launch.views import samples_and_length

FORWARD_STEP = 8  # tokens that a block has at a time, at the published widths
BACKWARD_STEP = {1152: 2, 768: 3}
MOST = 64  # tokens a block: partial sums are then a few percent of what is read
FORWARD_BLOCKS, BACKWARD_BLOCKS = 4, 2  # that a multiprocessor holds, in bfloat16


def is_fast(x: Tensor) -> bool:
    """Other widths have kernels of a row a block without 16-byte accesses; Triton's are faster."""
    return x.shape[-1] in BACKWARD_STEP


def _inputs(x, branch, cu, *rows):
    """Tokens and rows as the kernels take them, the samples and the longest."""
    x, branch = (dense_tokens(tensor, cu is not None) for tensor in one_dtype(x, branch))
    return x, branch, *rows_for(x.dtype, *rows)


def forward(x, branch, gate, bias, shift, scale, eps, cu, max_length):
    """(x', y), either of them an empty tensor where the op does not make it."""
    dtype = x.dtype
    x, branch, gate, bias, shift, scale = _inputs(x, branch, cu, gate, bias, shift, scale)
    out = None if branch is None else x.new_empty(x.shape)
    y = None if scale is None else x.new_empty(x.shape)
    samples, length = samples_and_length(x, cu, max_length)
    rows = tokens_per_block(x, samples, length, FORWARD_BLOCKS, MOST, FORWARD_STEP)
    if x.numel():
        torch.ops.tim_kernels_cuda.ada_layer_norm_forward(
            x, branch, gate, bias, shift, scale, out, y, eps, cu, max_length, rows
        )
    return tuple(x.new_empty(0, dtype=dtype) if z is None else z.to(dtype) for z in (out, y))


def backward(dout, dy, x, branch, gate, bias, scale, eps, cu, max_length):
    """(dx, dbranch, rows), as triton.py's."""
    dtypes = x.dtype, x.dtype if branch is None else branch.dtype
    dout, dy, x, branch = one_dtype(dout, dy, x, branch)
    x, branch, gate, bias, scale = _inputs(x, branch, cu, gate, bias, scale)
    dout, dy = (dense_tokens(tensor, cu is not None) for tensor in (dout, dy))
    dx = x.new_empty(x.shape)
    dbranch = None if branch is None else x.new_empty(x.shape)
    samples, length = samples_and_length(x, cu, max_length)
    step = BACKWARD_STEP.get(x.shape[-1], 1)
    rows = tokens_per_block(x, samples, length, BACKWARD_BLOCKS, MOST, step)
    shape = (4, samples, -(-length // rows), x.shape[-1])
    make = torch.empty if x.numel() else torch.zeros
    partial = make(shape, dtype=torch.float32, device=x.device)
    if x.numel():
        torch.ops.tim_kernels_cuda.ada_layer_norm_backward(
            dout, dy, x, branch, gate, bias, scale, dx, dbranch, partial, eps, cu, max_length, rows
        )
    dbranch = x.new_empty(0) if dbranch is None else dbranch
    return dx.to(dtypes[0]), dbranch.to(dtypes[1]), partial.sum(2)


jvp = tangents_in_triton("ada_layer_norm")
