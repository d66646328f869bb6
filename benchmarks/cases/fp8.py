"""Calls of the ops that emit FP8, as TiM's blocks make them. They have no derivative, and the GPUs
older than sm_89 no conversion."""

import math
from collections.abc import Iterator

import torch

import tim_kernels as ops

from .calls import Call, maker
from .shapes import Shape

OLDEST = 89


def calls(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Call]:
    make = maker(dtype, device)
    tokens, width, hidden = (shape.batch, math.prod(shape.grid)), shape.width, shape.width * 8 // 3
    x, branch = make(*tokens, width), make(*tokens, width)
    gate, shift, scale = (make(shape.batch, width) for _ in range(3))
    gated = ops.gated_residual_ada_layer_norm_fp8
    yield Call("ada_layer_norm to FP8", ops.ada_layer_norm_fp8, (x, shift, scale))
    yield Call("gated_residual_ada_layer_norm to FP8", gated, (x, branch, gate, shift, scale))
    yield Call("swiglu to FP8", ops.swiglu_fp8, (make(*tokens, hidden), make(*tokens, hidden)))
