"""How a fused op enters PyTorch: one schema, a fake kernel, gradients, and no silent tangents.

`torch.func.jvp` through a custom operator gives a zero tangent without an error, because the
operator's autograd kernel sees no tensor that requires grad; and torch.compile cannot trace an
`autograd.Function` with a `jvp`. So an op has two faces: the operator itself, which torch.compile
sees, which has a backward and refuses a live tangent; and an `autograd.Function` around it with
backward and jvp, which eager code gets. `differentiable` returns the function that picks.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .backend import requested, use_backend

LIBRARY = torch.library.Library("tim_kernels", "DEF")
NO_TANGENT = (
    "tim_kernels::{} has no forward derivative inside torch.compile or as a bare operator: "
    "call the public function of tim_kernels in eager mode"
)


def define(schema: str, kernel: Callable, fake: Callable) -> Callable:
    """Register `tim_kernels::<schema>`: `kernel` runs it, `fake` gives the outputs' shapes.

    The operator has no derivative until `differentiable` adds one, and raises when asked for it:
    a tangent that depends on weights may be used as a constant, not differentiated.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CPU")
    LIBRARY.impl(name, _on_its_device(kernel), "CUDA")
    torch.library.register_fake(f"tim_kernels::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.tim_kernels, name).default
    _GRADIENTS[name] = _without_derivative(op, name)

    def autograd(keyset, *args):
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if torch._C._is_fwd_grad_enabled() and _has_tangent(tensors):
            raise NotImplementedError(NO_TANGENT.format(name))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return _GRADIENTS[name](keyset, *args)
        return _below_autograd(op, keyset, args)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    return op


def differentiable(op, setup_context: Callable, backward: Callable, jvp: Callable) -> Callable:
    """Give `op` its derivatives; returns the function to call instead of it.

    The three are those of an `autograd.Function`: setup_context(ctx, inputs, output),
    backward(ctx, *gradients) and jvp(ctx, *tangents), where a gradient or tangent that does not
    exist is None.
    """
    name = op.name().removeprefix("tim_kernels::")

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(keyset, *args):
            return _below_autograd(op, keyset, args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            remember_backend(ctx)
            setup_context(ctx, inputs[1:], output)

        @staticmethod
        @once_differentiable
        def backward(ctx, *gradients):
            with remembered_backend(ctx):
                return None, *backward(ctx, *gradients)

    class Dual(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return op(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            remember_backend(ctx)
            setup_context(ctx, inputs, output)

        @staticmethod
        @once_differentiable
        def backward(ctx, *gradients):
            with remembered_backend(ctx):
                return backward(ctx, *gradients)

    Dual.jvp = staticmethod(jvp)
    Dual.__name__ = Dual.__qualname__ = name
    _GRADIENTS[name] = Gradient.apply

    def call(*args):
        if not torch.compiler.is_compiling():
            return op(*args) if is_plain() else Dual.apply(*args)
        if _has_tangent([arg for arg in args if isinstance(arg, Tensor)]):
            raise NotImplementedError(NO_TANGENT.format(name))
        return op(*args)

    return call


def is_plain() -> bool:
    """Whether nothing can be differentiated here, as in sampling: an `autograd.Function` is most
    of what a call then costs on the host."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return False
    return not torch._C._are_functorch_transforms_active()


def remember_backend(ctx) -> None:
    """Note the backend in force: a choice is a thread's, and autograd has threads of its own."""
    ctx.backend = requested()


def remembered_backend(ctx) -> AbstractContextManager:
    return use_backend(ctx.backend)


def _on_its_device(kernel: Callable) -> Callable:
    """`kernel` with its tensors' device current, where Triton launches."""

    def run(*args):
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        with torch.cuda.device(tensor.device):
            return kernel(*args)

    return run


_GRADIENTS: dict[str, Callable] = {}


def _without_derivative(op, name: str) -> Callable:
    """The operator as a constant that raises when differentiated. Its graph ends here, so that a
    tangent does not keep alive what it was made of."""

    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(keyset, end, *args):
            return _below_autograd(op, keyset, args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *gradients):
            raise NotImplementedError(f"tim_kernels::{name} has no derivative: it is one itself")

    def apply(keyset, *args):
        constants = (arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        return Constant.apply(keyset, torch.empty(0, requires_grad=True), *constants)

    return apply


def _has_tangent(tensors) -> bool:
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _below_autograd(op, keyset, args):
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
