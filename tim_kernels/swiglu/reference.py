import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulation_dtype


def swiglu(
    gate: Tensor,
    value: Tensor | None = None,
    gate_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
) -> Tensor:
    """silu(gate + gate_bias)·(value + value_bias) (arXiv 2002.05202, equation 5).

    gate and value are (..., C); with value left out, gate is the packed (..., 2C) of both. The
    biases are (C,). Returns (..., C) in gate's dtype.
    """
    if value is None:
        gate, value = gate.chunk(2, dim=-1)
    dtype = accumulation_dtype(gate, value)
    g, v = gate.to(dtype), value.to(dtype)
    g = g if gate_bias is None else g + gate_bias.to(dtype)
    v = v if value_bias is None else v + value_bias.to(dtype)
    return (F.silu(g) * v).to(gate.dtype)
