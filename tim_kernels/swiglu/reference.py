import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulation_dtype
from ..fp8 import quantise_rows


def swiglu(gate: Tensor, value: Tensor | None = None) -> Tensor:
    """silu(gate)·value (arXiv 2002.05202, equation 5).

    gate and value are (..., C); with value left out, gate is the packed (..., 2C) of both.
    Returns (..., C) in gate's dtype.
    """
    if value is None:
        gate, value = gate.chunk(2, dim=-1)
    dtype = accumulation_dtype(gate, value)
    return (F.silu(gate.to(dtype)) * value.to(dtype)).to(gate.dtype)


def swiglu_fp8(gate: Tensor, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The unrounded silu(gate)·value as FP8 values (..., C) and scales (..., 1)."""
    dtype = accumulation_dtype(gate, value)
    return quantise_rows(swiglu(gate.to(dtype), value))


def swiglu_with_paths(
    gate: Tensor, value: Tensor | None, gate_path: Tensor | None, value_path: Tensor | None
) -> Tensor:
    """swiglu of gate and value with zeros (C,) added."""
    if value is None:
        gate, value = gate.chunk(2, dim=-1)
    gate = gate if gate_path is None else gate + gate_path.to(gate.dtype)
    return swiglu(gate, value if value_path is None else value + value_path.to(value.dtype))
