"""Calls of the ops that emit FP8, as TiM's blocks make them, beside the same in eager PyTorch. They
have no derivative, and the GPUs older than sm_89 no conversion."""

import math
from collections.abc import Callable, Iterator

import torch

import tim_kernels as ops
from tim_kernels.fp8 import has_fp8
from tim_kernels.fp8 import quantise_rows as reference
from tim_kernels.quantise_rows.fp8 import quantise_rows

from . import eager
from .calls import Call, maker
from .shapes import Shape

OLDEST = 89
KERNELS = "quantise_rows", "swiglu.fp8"  # of tuning.json


def calls(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Call]:
    """Of unpacked tokens."""
    make = maker(dtype, device)
    tokens, width, hidden = (shape.batch, math.prod(shape.grid)), shape.width, shape.width * 8 // 3
    x, branch = make(*tokens, width), make(*tokens, width)
    gate, shift, scale = (make(shape.batch, width) for _ in range(3))
    halves = make(*tokens, hidden), make(*tokens, hidden)
    plain = eager.Tokens(shape.grid, None, shape.head_dim, device)
    forms = {
        "ada_layer_norm": ((x, shift, scale), plain.ada_layer_norm),
        "gated_residual_ada_layer_norm": (
            (x, branch, gate, shift, scale), plain.gated_residual_ada_layer_norm,
        ),
        "swiglu": (halves, eager.swiglu),
    }  # fmt: skip
    only = dict(directions=("forward",))
    yield Call("quantise_rows", quantise_rows, (x,), reference, **only)
    for name, (tensors, function) in forms.items():
        op = getattr(ops, f"{name}_fp8")
        yield Call(f"{name} to FP8", op, tensors, _quantised(function), **only)


def why_not(device: str) -> str | None:
    """Why there is no FP8 on a device."""
    if has_fp8(torch.device(device)):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor} has no FP8: GPUs of sm_{OLDEST} and later do"


def _quantised(function: Callable) -> Callable:
    """With the last output as values and scales."""

    def both(*tensors):
        out = function(*tensors)
        *rest, last = out if isinstance(out, tuple) else (out,)
        return *rest, *reference(last)

    return both
