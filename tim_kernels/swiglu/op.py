"""SwiGLU's elementwise half: operators, derivatives and public function."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_channels, check_floating, is_double
from ..dispatch.backend import Op
from ..dispatch.operators import Operator
from . import cuda, reference


def _triton():
    from . import triton

    return triton


OP = Op("swiglu", _triton, cuda)


def _output(gate, value, *_):
    width = gate.shape[-1] if value is not None else gate.shape[-1] // 2
    return gate.new_empty((*gate.shape[:-1], width))


def _backward_fake(dout, gate, value):
    dvalue = gate.new_empty(0) if value is None else value.new_empty(value.shape)
    return gate.new_empty(gate.shape), dvalue


def _summed_backward_fake(dout, gate, value):
    sums = gate.new_empty((2, dout.shape[-1]), dtype=torch.float32)
    return *_backward_fake(dout, gate, value), sums


forward_op = Operator(OP, "swiglu(Tensor gate, Tensor? value) -> Tensor", _output)
backward_op = Operator(
    OP,
    "swiglu_backward(Tensor dout, Tensor gate, Tensor? value) -> (Tensor, Tensor)",
    _backward_fake,
)
summed_op = Operator(
    OP,
    "swiglu_summed(Tensor gate, Tensor? value, Tensor? gate_path, Tensor? value_path) -> Tensor",
    _output,
)
summed_backward_op = Operator(
    OP,
    "swiglu_summed_backward(Tensor dout, Tensor gate, Tensor? value) -> (Tensor, Tensor, Tensor)",
    _summed_backward_fake,
)


def _vjp(args, needs, dout):
    if dout is None:
        return None, None
    dgate, dvalue = backward_op(dout, *args)
    return dgate, None if args[1] is None else dvalue


def _summed_vjp(args, needs, dout):
    gate, value, *paths = args
    if dout is None:
        return None, None, None, None
    dgate, dvalue, sums = summed_backward_op(dout, gate, value)
    of_paths = (
        None if path is None else total.to(path.dtype)
        for total, path in zip(sums.unbind(0), paths, strict=True)
    )
    return dgate, None if value is None else dvalue, *of_paths


def check(gate: Tensor, value: Tensor | None, *paths: Tensor | None) -> bool:
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
    for name, path in zip(("gate_path", "value_path"), paths, strict=False):
        if path is not None:
            check_channels(name, path, _output(gate, value).shape[-1], gate)
    return is_double(gate, value)


def _on_cpu(gate, value):
    """With silu rounded in between, as eager PyTorch does: casts would cost as much again."""
    if value is None:
        gate, value = gate.chunk(2, dim=-1)
    if gate.dtype != value.dtype:
        return reference.swiglu(gate, value)
    return F.silu(gate) * value


_call = forward_op.differentiable(2, check, reference.swiglu, _vjp, _on_cpu)
_summed = summed_op.differentiable(4, check, reference.swiglu_with_paths, _summed_vjp)


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


def swiglu_with_paths(
    gate: Tensor, value: Tensor | None, gate_path: Tensor | None, value_path: Tensor | None
) -> Tensor:
    """`swiglu(gate, value)`; gate_path and value_path are zeros (C,), which are not read. Their
    gradients are what those of biases of gate and value would be, sums over tokens, taken in the
    pass that makes those of gate and value."""
    if gate_path is None and value_path is None:
        return _call(gate, value)
    return _summed(gate, value, gate_path, value_path)
