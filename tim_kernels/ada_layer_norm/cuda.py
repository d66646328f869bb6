"""Launchers of csrc/ada_layer_norm.cu, as triton.py's; tangents are Triton's."""

import torch
from torch import Tensor

from ..dispatch import extension
from ..launch.dense import Reader, one_dtype, tokens_per_block
from ..launch.shares import MOST, samples_and_length
from ..launch.views import view_cond, view_tokens

FORWARD_STEP = 8  # tokens that a block has at a time, at the published widths
BACKWARD_STEP = {1152: 2, 768: 3}
FORWARD_BLOCKS, BACKWARD_BLOCKS = 4, 2  # that a multiprocessor holds, in bfloat16


def is_fast(x: Tensor) -> bool:
    """Other widths have kernels of a row a block without 16-byte accesses; Triton's are faster."""
    return x.shape[-1] in BACKWARD_STEP


def _reader(tokens, cond, is_packed: bool) -> Reader:
    """Tokens in one dtype, conditioning rows in the same if all of them are, else in float32."""
    dtype = one_dtype(*tokens)
    cond_dtype = dtype if all(row is None or row.dtype == dtype for row in cond) else torch.float32
    return Reader(
        *((x, dtype, view_tokens(x, is_packed)) for x in tokens),
        *((row, cond_dtype, view_cond(row)) for row in cond),
    )


def forward(x, branch, gate, bias, shift, scale, eps, cu, max_length):
    """(x', y), either of them an empty tensor where the op does not make it."""
    read = _reader((x, branch), (gate, bias, shift, scale), cu is not None)
    samples, length = samples_and_length(x, cu, max_length)
    share = tokens_per_block(x, samples, length, FORWARD_BLOCKS, MOST, FORWARD_STEP)
    launch = extension.ops().ada_layer_norm_forward.default

    def run(x, branch, gate, bias, shift, scale, eps, cu, max_length):
        dtype = x.dtype
        x, branch, *cond = read(x, branch, gate, bias, shift, scale)
        out = None if branch is None else x.new_empty(x.shape)
        y = None if scale is None else x.new_empty(x.shape)
        if x.numel():
            launch(x, branch, *cond, out, y, eps, cu, max_length, share)
        return tuple(x.new_empty(0, dtype=dtype) if z is None else z.to(dtype) for z in (out, y))

    return run


def backward(dout, dy, x, branch, gate, bias, scale, eps, cu, max_length):
    """(dx, dbranch, sums), as triton.py's."""
    read = _reader((dout, dy, x, branch), (gate, bias, scale), cu is not None)
    samples, length = samples_and_length(x, cu, max_length)
    step = BACKWARD_STEP.get(x.shape[-1], 1)
    share = tokens_per_block(x, samples, length, BACKWARD_BLOCKS, MOST, step)
    shape = 4, samples, -(-length // share), x.shape[-1]
    make = torch.empty if x.numel() else torch.zeros
    launch = extension.ops().ada_layer_norm_backward.default

    def run(dout, dy, x, branch, gate, bias, scale, eps, cu, max_length):
        dtypes = x.dtype, x.dtype if branch is None else branch.dtype
        dout, dy, x, branch, *cond = read(dout, dy, x, branch, gate, bias, scale)
        dx = x.new_empty(x.shape)
        dbranch = None if branch is None else x.new_empty(x.shape)
        partial = make(shape, dtype=torch.float32, device=x.device)
        if x.numel():
            gradients = dx, dbranch, partial
            launch(dout, dy, x, branch, *cond, *gradients, eps, cu, max_length, share)
        dbranch = x.new_empty(0) if dbranch is None else dbranch
        return dx.to(dtypes[0]), dbranch.to(dtypes[1]), partial.sum(2)

    return run
