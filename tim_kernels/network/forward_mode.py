"""Forward mode through other people's networks, without PyTorch's products of zeros.

The tangent of x·W is tx·W + x·tW. Where W has no tangent, torch.func.jvp multiplies x by a matrix
of zeros nevertheless, so that a layer costs three products instead of two. And PyTorch's fused
attention has no forward derivative at all.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ..attention import sdpa
from ..dispatch.torch_private import (
    has_tangent,
    is_custom_operator,
    is_forward_mode,
    is_forward_mode_enabled,
    seeing,
)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """A context in which torch.nn.functional.scaled_dot_product_attention, and with it
    torch.nn.MultiheadAttention, carries tangents: anybody's network under torch.func.jvp or
    torch.autograd.forward_ad, where PyTorch raises a NotImplementedError.

    It holds for this thread, and for tensors with tangents alone. `attention` makes output and
    tangent, by its kernel in memory that grows with N: with any positive scale, causal or not,
    with heads in groups and boolean masks (…, 1, 1, M). Other masks, dropout and what `attention`
    has no kernel for go to PyTorch's composite implementation, in memory that grows with N·M.
    Layers whose weights have no tangent cost two products, not three.

    Raises:
        NotImplementedError: an operator of somebody's torch.library that lets a tangent fall, such
            as another attention kernel, which by itself would give zeros. Kernels that are called
            past PyTorch's dispatcher cannot be seen.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
        >>> x, tangent = torch.randn(2, 2, 16, 32)
        >>> with forward_mode():
        ...     out, dout = torch.func.jvp(layer, (x,), (tangent,))
    """
    with _ForwardMode():
        yield


def lean(function: Callable) -> Callable:
    """`function`, in which F.linear, torch.bmm and torch.baddbmm with a tangent in their input
    alone cost two products. Values and derivatives are the same."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        if not is_forward_mode():
            return function(*args, **kwargs)
        with _LeanProducts():
            return function(*args, **kwargs)

    return run


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    parameters = (weight,) if bias is None else (weight, bias)
    return _product(F.linear, input, parameters, F.linear, weight)


def _bmm(input: Tensor, mat2: Tensor, *more, **options) -> Tensor:
    if more or options:  # out, out_dtype
        return torch.bmm(input, mat2, *more, **options)
    return _product(torch.bmm, input, (mat2,), torch.bmm, mat2)


def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *more, **options) -> Tensor:
    if more or options:  # out, beta, …
        return torch.baddbmm(input, batch1, batch2, *more, **options)

    def baddbmm(batch1, batch2, input):
        return torch.baddbmm(input, batch1, batch2)

    return _product(baddbmm, batch1, (batch2, input), torch.bmm, batch2)


def _product(
    function: Callable,
    x: Tensor,
    parameters: tuple[Tensor, ...],
    derivative: Callable,
    weight: Tensor,
) -> Tensor:
    """function(x, *parameters); where x alone has a tangent, that of the result is
    derivative(tangent, weight)."""
    primal, tangent = forward_ad.unpack_dual(x)
    if tangent is None or any(forward_ad.unpack_dual(p).tangent is not None for p in parameters):
        return function(x, *parameters)
    return forward_ad.make_dual(function(primal, *parameters), derivative(tangent, weight))


def _attention(*args, **kwargs) -> Tensor:
    is_dual = has_tangent((*args, *kwargs.values()))
    attend = sdpa.scaled_dot_product_attention if is_dual else F.scaled_dot_product_attention
    return attend(*args, **kwargs)


class _LeanProducts(TorchFunctionMode):
    rules = {F.linear: _linear, torch.bmm: _bmm, torch.baddbmm: _baddbmm}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.rules.get(function, function)(*args, **(kwargs or {}))


class _ForwardMode(_LeanProducts):
    rules = _LeanProducts.rules | {
        F.scaled_dot_product_attention: _attention,
        F.multi_head_attention_forward: seeing(  # in which no mode is active
            F.multi_head_attention_forward,
            scaled_dot_product_attention=_attention,
            linear=_linear,
            has_torch_function=lambda _: False,
        ),
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not is_forward_mode() or not (
            torch.compiler.is_compiling() or is_forward_mode_enabled()
        ):
            return function(*args, **kwargs)
        out = super().__torch_function__(function, types, args, kwargs)
        if is_custom_operator(function) and _is_lost(_tensors((args, kwargs)), _tensors(out)):
            raise NotImplementedError(
                f"{function} has no forward derivative: the tangents of its arguments would be lost"
            )
        return out


def _is_lost(given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether an operator had tangents and gave none, to whatever could have one."""
    could = not made or any(x.is_floating_point() or x.is_complex() for x in made)
    return could and has_tangent(given) and not has_tangent(made)


def _tensors(tree) -> list[Tensor]:
    if isinstance(tree, dict):
        tree = [*tree.values()]
    if isinstance(tree, (list, tuple)):
        return [x for branch in tree for x in _tensors(branch)]
    return [tree] if isinstance(tree, Tensor) else []
