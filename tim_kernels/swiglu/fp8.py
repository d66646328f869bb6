"""SwiGLU's elementwise half whose output is FP8 for an 8-bit product."""

import torch
from torch import Tensor

from ..dispatch.operators import InferenceOperator
from ..fp8 import check_width, has_fp8
from . import reference
from .op import OP, check


def _fake(gate, value):
    width = gate.shape[-1] if value is not None else gate.shape[-1] // 2
    values = gate.new_empty((*gate.shape[:-1], width), dtype=torch.float8_e4m3fn)
    return values, gate.new_empty((*gate.shape[:-1], 1), dtype=torch.float32)


def _check(gate: Tensor, value: Tensor | None) -> bool:
    is_double = check(gate, value)
    check_width("gate", gate.shape[-1])
    return is_double or not has_fp8(gate.device)


forward_op = InferenceOperator(
    OP, "swiglu_fp8(Tensor gate, Tensor? value) -> (Tensor, Tensor)", _fake, _check,
    reference.swiglu_fp8,
)  # fmt: skip


def swiglu_fp8(gate: Tensor, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`swiglu` as FP8 E4M3 (arXiv 2209.05433) with a scale a row, in the same pass.

    Arguments as for `swiglu`. Returns values, float8_e4m3fn (…, C), and scales, float32 (…, 1), as
    `ada_layer_norm_fp8` does.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        NotImplementedError: an argument needs a gradient or has a tangent.

    Example:
        >>> values, scales = swiglu_fp8(torch.randn(2, 16, 2 * 256))
        >>> values.shape, scales.shape
        (torch.Size([2, 16, 256]), torch.Size([2, 16, 1]))
    """
    return forward_op(gate, value)
