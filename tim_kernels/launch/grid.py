"""Launches of Triton kernels: made once for a signature, run with nothing but tensors.

A kernel's arguments are views (views.py), numbers and constants. Lengths and strides that are
counted in elements are passed in units of ALIGN elements, a constant of the kernel, so that the
compiler knows them to be multiples of it and can use 16-byte accesses. Numbers are never
specialised, so nothing recompiles when a length changes.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from .views import View


def kernel(function):
    """`triton.jit` that specialises on no number: only constexprs and pointers select code."""
    parameters = inspect.signature(function).parameters
    numbers = [
        name
        for name, parameter in parameters.items()
        if not name.endswith("_ptr") and parameter.annotation is not tl.constexpr
    ]
    return triton.jit(function, do_not_specialize=numbers)


class Elements(int):
    """A number of elements that reaches a kernel in units of ALIGN."""


_is_dry = False


@contextlib.contextmanager
def dry() -> Iterator[None]:
    """For tools: the enclosed code prepares its launches and starts none of them."""
    global _is_dry
    before, _is_dry = _is_dry, True
    try:
        yield
    finally:
        _is_dry = before


class Launch:
    """`function` over a grid of programs with `arguments`, of which the views wait for tensors.

    `units` are what ALIGN may be; the first that divides all strides and lengths is it. A grid
    without programs launches nothing.
    """

    def __init__(
        self,
        function,
        programs: Sequence[int],
        arguments: Sequence[View | int | float],
        units: Sequence[int] = (16, 8, 1),
        **options,
    ):
        lengths = [n for n in arguments if isinstance(n, Elements)]
        for view in arguments:
            lengths += view.strides if isinstance(view, View) else ()
        if "ALIGN" not in function.arg_names:
            units = (1,)
        align = next(unit for unit in units if all(n % unit == 0 for n in lengths))
        self.flat, self.slots, self.copied = [], [], []
        for argument in arguments:
            if isinstance(argument, View):
                if argument.is_copied:
                    self.copied.append(len(self.slots))
                self.slots.append(len(self.flat))
                self.flat += None, *(stride // align for stride in argument.strides)
            else:
                is_length = isinstance(argument, Elements)
                self.flat.append(int(argument) // align if is_length else argument)
        self.function, self.programs = function, tuple(programs)
        self.is_empty = 0 in self.programs
        self.options = options | (dict(ALIGN=align) if "ALIGN" in function.arg_names else {})

    def __call__(self, *tensors: Tensor | None) -> None:
        """Start it on one tensor, or None, for each view, in the current stream."""
        if self.is_empty:
            return
        if self.copied:
            tensors = list(tensors)
            for i in self.copied:
                tensors[i] = tensors[i].contiguous()
        flat = self.flat.copy()
        for slot, tensor in zip(self.slots, tensors, strict=True):
            flat[slot] = tensor
        if not _is_dry:
            self.function.run(*flat, grid=self.programs, warmup=False, **self.options)
