"""Launches of Triton kernels.

Lengths and strides that are counted in elements reach a kernel in units of ALIGN elements, a
constant of the kernel, so that the compiler knows them to be multiples of it and can use 16-byte
accesses. Numbers are never specialised, so nothing recompiles when a length changes.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence

import triton
import triton.language as tl

from .calls import Call, Made, Out
from .views import In


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


REGISTERS = 65536  # of a multiprocessor
_interpreter = threading.RLock()  # it changes triton.language while it runs
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


def launch(
    function,
    programs: Sequence[int],
    arguments: Sequence,
    made: Sequence[Made | None],
    args: tuple,
    finish: Callable | None = None,
    units: Sequence[int] = (16, 8, 1),
    **options,
) -> Call:
    """A call of a Triton kernel over a grid of programs, with constants and num_warps as options.

    `units` are what ALIGN may be; the first that divides all strides and lengths is it.
    """
    lengths = [n for n in arguments if isinstance(n, Elements)]
    for argument in arguments:
        if isinstance(argument, (In, Out)):
            lengths += [stride for stride in argument.strides if stride is not None]
    align = 1
    if "ALIGN" in function.arg_names:
        align = next(unit for unit in units if all(n % unit == 0 for n in lengths))
        options["ALIGN"] = align
    if most := options.get("maxnreg"):  # no more than so many threads can have
        options["maxnreg"] = min(most, REGISTERS // (32 * options["num_warps"]))
    flat = []
    for argument in arguments:
        if isinstance(argument, (In, Out)):
            strides = argument.strides
            flat += argument, *(None if stride is None else stride // align for stride in strides)
        else:
            flat.append(argument // align if isinstance(argument, Elements) else argument)

    def start(*flat) -> None:
        if not _is_dry:
            function.run(*flat, grid=programs, warmup=False, **options)

    def interpret(*flat) -> None:
        with _interpreter:
            start(*flat)

    is_compiled = isinstance(function, triton.JITFunction)
    return Call(start if is_compiled else interpret, flat, made, args, finish, 0 in programs)
