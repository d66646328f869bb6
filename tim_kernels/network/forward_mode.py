"""Forward mode without PyTorch's products of zeros.

The tangent of x·W is tx·W + x·tW. Where W has no tangent, torch.func.jvp multiplies x by a matrix
of zeros nevertheless, so that a layer costs three products instead of two.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ..dispatch.torch_private import is_forward_mode


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


class _LeanProducts(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        has_options = bool(kwargs) and function is not F.linear  # out, beta, …
        product = function if has_options else _PRODUCTS.get(function, function)
        return product(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    parameters = (weight,) if bias is None else (weight, bias)
    return _product(F.linear, input, parameters, F.linear, weight)


def _bmm(input: Tensor, mat2: Tensor) -> Tensor:
    return _product(torch.bmm, input, (mat2,), torch.bmm, mat2)


def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor) -> Tensor:
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


_PRODUCTS = {F.linear: _linear, torch.bmm: _bmm, torch.baddbmm: _baddbmm}
