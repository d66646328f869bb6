"""Every private name of torch that this package uses, in one place."""

import functools
from collections.abc import Callable, Iterable
from types import FunctionType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

is_functorch_active = torch._C._are_functorch_transforms_active
dispatch_modes = torch._C._len_torch_dispatch_stack  # how many are active
is_forward_mode_enabled = torch._C._is_fwd_grad_enabled
has_global_hooks = torch.nn.modules.module._has_any_global_hook
_functorch = torch._C._functorch
is_functorch_wrapped = _functorch.is_functorch_wrapped_tensor
math_attention = torch.ops.aten._scaled_dot_product_attention_math.default


def constant_when_compiled(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, without its import of the whole compiler."""
    function._dynamo_marked_constant = True
    return function


def cached_constant(function: Callable) -> Callable:
    """A cache, and a constant when compiled: dynamo would look into functools.cache by itself."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def constant(*args):
        return cached(*args)

    constant.cache_clear = cached.cache_clear
    return constant_when_compiled(constant)


def is_forward_mode() -> bool:
    """Whether tensors may have tangents here."""
    return forward_ad._current_level >= 0


def has_tangent(tensors: Iterable) -> bool:
    """Whether any of them, of which some may be no tensors, has a tangent; of one that vmap maps
    inside of forward mode it cannot be seen, and counts as one."""
    return is_forward_mode() and any(map(_has_tangent, tensors))


def _has_tangent(x) -> bool:
    if not isinstance(x, Tensor):
        return False
    is_hidden = not torch.compiler.is_compiling() and _functorch.is_batchedtensor(x)
    return is_hidden or forward_ad.unpack_dual(x).tangent is not None


@constant_when_compiled
def is_transformed() -> bool:
    """Whether a transform of torch.func is under way, in code that is being compiled too."""
    return _functorch.peek_interpreter_stack() is not None


def is_mapped(values: Iterable) -> bool:
    """Whether any of them is a tensor with a dimension that torch.func.vmap hides; torch.compile
    does not see it."""
    if torch.compiler.is_compiling() or not is_functorch_active():
        return False
    return any(map(_is_mapped, values))


def _is_mapped(x) -> bool:
    while isinstance(x, Tensor) and is_functorch_wrapped(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)  # of another transform
    return False


def has_graph(tensors: Iterable) -> bool:
    """Whether a gradient may be asked for of any of them, inside torch.func's transforms too."""
    return torch.is_grad_enabled() and any(map(_has_graph, tensors))


def _has_graph(x) -> bool:
    while not x.requires_grad and is_functorch_wrapped(x):
        x = _functorch.get_unwrapped(x)
    return x.requires_grad


def below_autograd(op, keyset, *args):
    """`op(*args)` by the kernel after autograd's, from inside autograd's."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def apply_function(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply` outside functorch, without binding the arguments to `forward`'s signature,
    which costs more on the host than all the rest."""
    return super(torch.autograd.Function, function).apply


def register_pytree(kind: type, names: tuple[str, ...]) -> None:
    """Make torch's transforms see the fields of a class, each a leaf. It is put together again
    without its `__init__`, from whatever the leaves have become."""

    def values(node) -> list:
        return [getattr(node, name) for name in names]

    def unflatten(leaves, _):
        node = object.__new__(kind)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(node, name, leaf)
        return node

    keys = [pytree.GetAttrKey(name) for name in names]
    pytree.register_pytree_node(
        kind,
        lambda node: (values(node), None),
        unflatten,
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        flatten_with_keys_fn=lambda node: (list(zip(keys, values(node), strict=True)), None),
    )


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
