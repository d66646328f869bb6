"""adaLN whose output is FP8 for an 8-bit product: operator and public functions."""

from typing import Literal

import torch
from torch import Tensor

from ..dispatch.operators import InferenceOperator
from ..fp8 import check_width, has_fp8
from ..segments import Segments, unpacked
from . import reference
from .op import ARGUMENTS, OP, arguments, check


def _fake(x, branch, *_):
    values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(0 if branch is None else x.shape), values, scales


def _check(*args) -> bool:
    is_double = check(*args)
    check_width("x", args[0].shape[-1])
    return is_double or not has_fp8(args[0].device)


def _reference(x, branch, gate, bias, shift, scale, weight, norm_bias, eps, norm, cu, max_length):
    return reference.ada_layer_norm_fp8(
        x, branch, gate, shift, scale, eps, bias, unpacked(cu, max_length, x),
        weight=weight, bias=norm_bias, norm=norm,
    )  # fmt: skip


forward_op = InferenceOperator(
    OP, f"ada_layer_norm_fp8({ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _fake, _check, _reference
)


def ada_layer_norm_fp8(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    segments: Segments | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Literal["layer", "rms"] = "layer",
) -> tuple[Tensor, Tensor]:
    """`ada_layer_norm` as FP8 E4M3 (arXiv 2209.05433) with a scale a row, in the same pass.

    Arguments as for `ada_layer_norm`. Returns values, float8_e4m3fn of x's shape, and scales,
    float32 (B, N, 1) or (T, 1), so that values·scales is the output: a row's scale is its largest
    magnitude / 448, of the unrounded output, and values are rounded once, to the nearest. A row of
    zeros gives zeros; one with NaN or infinity is not finite. GPUs older than sm_89 and float64 run
    on the reference.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown norm.
        NotImplementedError: an argument needs a gradient or has a tangent.

    Example:
        >>> x, shift, scale = torch.randn(2, 16, 64), torch.randn(2, 64), torch.randn(2, 64)
        >>> values, scales = ada_layer_norm_fp8(x, shift, scale)
        >>> values.dtype, scales.shape
        (torch.float8_e4m3fn, torch.Size([2, 16, 1]))
    """
    rows = None, None, None, shift, scale
    return forward_op(*arguments(x, *rows, weight, bias, eps, norm, segments))[1:]


def gated_residual_ada_layer_norm_fp8(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    branch_bias: Tensor | None = None,
    segments: Segments | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Literal["layer", "rms"] = "layer",
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_residual_ada_layer_norm` whose y is FP8 E4M3 with a scale a row, in the same pass.

    Arguments as for `gated_residual_ada_layer_norm`. Returns (x', values, scales): x' of x's shape
    and dtype, values and scales as of `ada_layer_norm_fp8`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown norm.
        NotImplementedError: an argument needs a gradient or has a tangent.

    Example:
        >>> x, branch = torch.randn(2, 2, 16, 64)
        >>> gate, shift, scale = torch.randn(3, 2, 64)
        >>> x, values, scales = gated_residual_ada_layer_norm_fp8(x, branch, gate, shift, scale)
    """
    rows = branch, gate, branch_bias, shift, scale
    return forward_op(*arguments(x, *rows, weight, bias, eps, norm, segments))
