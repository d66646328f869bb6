"""Every private name of torch that this package uses, in one place."""

from collections.abc import Callable, Iterable
from types import FunctionType

import torch
from torch import Tensor
from torch.autograd import forward_ad

is_functorch_active = torch._C._are_functorch_transforms_active
dispatch_modes = torch._C._len_torch_dispatch_stack  # how many are active
is_forward_mode_enabled = torch._C._is_fwd_grad_enabled
math_attention = torch.ops.aten._scaled_dot_product_attention_math.default


def is_forward_mode() -> bool:
    """Whether tensors may have tangents here."""
    return forward_ad._current_level >= 0


def has_tangent(tensors: Iterable) -> bool:
    """Whether any of them, of which some may be no tensors, has a tangent."""
    return is_forward_mode() and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


def below_autograd(op, keyset, *args):
    """`op(*args)` by the kernel after autograd's, from inside autograd's."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def constant_when_compiled(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, without its import of the whole compiler."""
    function._dynamo_marked_constant = True
    return function


def apply_function(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply` outside functorch, without binding the arguments to `forward`'s signature,
    which costs more on the host than all the rest."""
    return super(torch.autograd.Function, function).apply


def storage_id(tensor: Tensor) -> int:
    """The same for tensors that share memory."""
    return tensor.untyped_storage()._cdata


def is_custom_operator(function: Callable) -> bool:
    """Whether it is an operator of torch.ops that is not PyTorch's own."""
    is_operator = isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    return is_operator and str(function).partition(".")[0] not in ("aten", "prim", "prims")


def seeing(function: Callable, **names) -> Callable:
    """A copy of a Python function of torch in which some global names mean something else."""
    scope = function.__globals__ | names
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
