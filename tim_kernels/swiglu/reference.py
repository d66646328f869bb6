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
