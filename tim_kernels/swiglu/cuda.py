"""Launchers of csrc/swiglu.cu, with the arguments of triton.py's; tangents are Triton's."""

import torch

from ..dispatch.extension import one_dtype, tangents_in_triton
from ..launch.views import rows_of


def _rows(gate, value):
    """gate and value as rows; of a packed tensor, its halves."""
    return rows_of(gate).chunk(2, dim=1) if value is None else (rows_of(gate), rows_of(value))


def forward(gate, value):
    """silu(gate)·value; value None says that gate is packed."""
    dtype = gate.dtype
    gate, value = one_dtype(gate, value)
    C = gate.shape[-1] if value is not None else gate.shape[-1] // 2
    out = gate.new_empty((*gate.shape[:-1], C))
    if out.numel():
        torch.ops.tim_kernels_cuda.swiglu_forward(*_rows(gate, value), out.view(-1, C))
    return out.to(dtype)


def backward(dout, gate, value):
    """(dgate, dvalue), or of a packed gate its gradient and an empty tensor."""
    dtypes = gate.dtype, gate.dtype if value is None else value.dtype
    dout, gate, value = one_dtype(dout, gate, value)
    dgate = gate.new_empty(gate.shape)
    dvalue = None if value is None else value.new_empty(value.shape)
    if gate.numel():
        inputs, outputs = _rows(gate, value), _rows(dgate, dvalue)
        torch.ops.tim_kernels_cuda.swiglu_backward(rows_of(dout), *inputs, *outputs)
    dvalue = gate.new_empty(0) if dvalue is None else dvalue
    return dgate.to(dtypes[0]), dvalue.to(dtypes[1])


jvp = tangents_in_triton("swiglu")
