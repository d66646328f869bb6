"""SwiGLU's elementwise half: operators, derivatives and public function."""

import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, is_double
from ..dispatch.backend import Op
from ..dispatch.operators import Operator
from . import cuda, reference


def _triton():
    from . import triton

    return triton


OP = Op("swiglu", _triton, cuda)


def _output(gate, value):
    width = gate.shape[-1] if value is not None else gate.shape[-1] // 2
    return gate.new_empty((*gate.shape[:-1], width))


def _backward_fake(dout, gate, value):
    dvalue = gate.new_empty(0) if value is None else value.new_empty(value.shape)
    return gate.new_empty(gate.shape), dvalue


forward_op = Operator(OP, "swiglu(Tensor gate, Tensor? value) -> Tensor", _output)
backward_op = Operator(
    OP,
    "swiglu_backward(Tensor dout, Tensor gate, Tensor? value) -> (Tensor, Tensor)",
    _backward_fake,
)


def _vjp(args, needs, dout):
    if dout is None:
        return None, None
    dgate, dvalue = backward_op(dout, *args)
    return dgate, None if args[1] is None else dvalue


def check(gate: Tensor, value: Tensor | None) -> bool:
    for name, x in (("gate", gate), ("value", value)):
        if x is not None:
            check_floating(name, x)
    if gate.ndim == 0:
        raise ValueError("gate must be (…, C), got a scalar")
    if value is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"gate without value must be packed (…, 2C), of even width; got {tuple(gate.shape)}"
            )
    elif value.shape != gate.shape:
        raise ValueError(
            f"value must be shaped as gate, {tuple(gate.shape)}; got {tuple(value.shape)}"
        )
    elif value.device != gate.device:
        raise ValueError(f"value must be on {gate.device} like gate, got {value.device}")
    return is_double(gate, value)


def _on_cpu(gate, value):
    """With silu rounded in between, as eager PyTorch does: casts would cost as much again."""
    if value is None:
        gate, value = gate.chunk(2, dim=-1)
    if gate.dtype != value.dtype:
        return reference.swiglu(gate, value)
    return F.silu(gate) * value


_call = forward_op.differentiable(2, check, reference.swiglu, _vjp, _on_cpu)


def swiglu(gate: Tensor, value: Tensor | None = None) -> Tensor:
    """silu(gate)·value, the elementwise half of SwiGLU (arXiv 2002.05202, equation 5).

    Args:
        gate, value: (…, C), any leading shape; float32, bfloat16 or float16 in any mix. Halves
            of one (…, 2C) tensor are read where they are.
        value: None says that gate is the packed (…, 2C) = [gate | value], the output of one GEMM
            for both projections; its gradient is then one packed tensor too.

    Returns (…, C) in gate's dtype; computed in float32 and rounded once. float64 runs on the
    reference.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Example:
        >>> both = torch.nn.Linear(64, 2 * 256)(torch.randn(2, 16, 64))  # both by one GEMM
        >>> swiglu(both).shape
        torch.Size([2, 16, 256])
    """
    return _call(gate, value)
