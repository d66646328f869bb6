"""Tokens as FP8 for an 8-bit product, where no kernel before it makes them so."""

import torch
from torch import Tensor

from .. import fp8
from ..checks import check_floating, is_double
from ..dispatch.backend import Op
from ..dispatch.operators import InferenceOperator


def _triton():
    from . import triton

    return triton


OP = Op("quantise_rows", _triton)


def _fake(x):
    values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return values, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _check(x: Tensor) -> bool:
    check_floating("x", x)
    if x.ndim == 0:
        raise ValueError("x must be (…, C), got a scalar")
    fp8.check_width("x", x.shape[-1])
    return is_double(x) or not fp8.has_fp8(x.device)


forward_op = InferenceOperator(
    OP, "quantise_rows(Tensor x) -> (Tensor, Tensor)", _fake, _check, fp8.quantise_rows
)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (…, C), any float dtype, as FP8 E4M3 (arXiv 2209.05433) with a scale a row.

    Returns values, float8_e4m3fn of x's shape, and scales, float32 (…, 1), as `ada_layer_norm_fp8`
    does. GPUs older than sm_89 and float64 run on the reference.

    Raises:
        ValueError: x is no float, a scalar, or has no channels.
        NotImplementedError: x needs a gradient or has a tangent.

    Example:
        >>> values, scales = quantise_rows(torch.randn(2, 16, 64))
        >>> values.dtype, scales.shape
        (torch.float8_e4m3fn, torch.Size([2, 16, 1]))
    """
    return forward_op(x)
