import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulation_dtype


def swiglu(gate: Tensor, value: Tensor | None = None) -> Tensor:
    """silu(gate)·value (arXiv 2002.05202, equation 5).

    gate and value are (..., C); with value left out, gate is the packed (..., 2C) of both.
    Returns (..., C) in gate's dtype.
    """
    if value is None:
        gate, value = gate.chunk(2, dim=-1)
    dtype = accumulation_dtype(gate, value)
    return (F.silu(gate.to(dtype)) * value.to(dtype)).to(gate.dtype)
