"""Launchers of csrc/swiglu.cu, as triton.py's; tangents are Triton's."""

from ..dispatch import extension
from ..launch.dense import Reader, one_dtype
from ..launch.views import view_matrix


def _reader(*tensors) -> Reader:
    dtype = one_dtype(*tensors)
    return Reader(*((x, dtype, view_matrix(x)) for x in tensors))


def _matrices(gate, value):
    """gate and value as (rows, C); of a packed tensor, its halves."""
    gate = gate.reshape(-1, gate.shape[-1])
    return gate.chunk(2, dim=1) if value is None else (gate, value.reshape(-1, value.shape[-1]))


def forward(gate, value):
    """silu(gate)·value; value None says that gate is packed."""
    read = _reader(gate, value)
    C = gate.shape[-1] if value is not None else gate.shape[-1] // 2
    shape = *gate.shape[:-1], C
    launch = extension.ops().swiglu_forward.default

    def run(gate, value):
        dtype = gate.dtype
        gate, value = read(gate, value)
        out = gate.new_empty(shape)
        if out.numel():
            launch(*_matrices(gate, value), out.view(-1, C))
        return out.to(dtype)

    return run


def backward(dout, gate, value):
    """(dgate, dvalue), or of a packed gate its gradient and an empty tensor."""
    read = _reader(dout, gate, value)
    launch = extension.ops().swiglu_backward.default

    def run(dout, gate, value):
        dtypes = gate.dtype, gate.dtype if value is None else value.dtype
        dout, gate, value = read(dout, gate, value)
        dgate = gate.new_empty(gate.shape)
        dvalue = None if value is None else value.new_empty(value.shape)
        if gate.numel():
            inputs, outputs = _matrices(gate, value), _matrices(dgate, dvalue)
            launch(dout.reshape(-1, dout.shape[-1]), *inputs, *outputs)
        dvalue = gate.new_empty(0) if dvalue is None else dvalue
        return dgate.to(dtypes[0]), dvalue.to(dtypes[1])

    return run
