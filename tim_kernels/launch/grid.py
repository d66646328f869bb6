"""What every launcher of a Triton kernel over tokens needs.

A view (views.py) reaches a kernel as its pointer and its strides. Strides are passed in units of
ALIGN elements, a constant of the kernel, so that the compiler knows them to be multiples of it and
can use 16-byte accesses; lengths and strides are never specialised, so nothing recompiles when a
length changes.
"""

import inspect

import triton
import triton.language as tl
from torch import Tensor

from .views import VIEWS, multiprocessors, samples_and_length, share_of

ALIGN = 16, 8, 1  # elements; heads of 72 are 8 apart


def kernel(function):
    """`triton.jit` that specialises on no number: only constexprs and pointers select code."""
    parameters = inspect.signature(function).parameters
    numbers = [
        name
        for name, parameter in parameters.items()
        if not name.endswith("_ptr") and parameter.annotation is not tl.constexpr
    ]
    return triton.jit(function, do_not_specialize=numbers)


class Plan:
    """One launch over the tokens of every sample: samples × tiles programs of `rows` tokens."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, max_length: int, rows: int):
        self.device, self.cu_seqlens, self.rows = x.device, cu_seqlens, rows
        self.samples, self.length = samples_and_length(x, cu_seqlens, max_length)
        self.is_empty = x.numel() == 0 or self.length == 0

    @property
    def tiles(self) -> int:
        return -(-self.length // self.rows)

    def spread(self, num_warps: int, columns: int = 1, most: int = 64) -> None:
        """Give each program several tiles, for a reduction over tokens: as many as leave every
        multiprocessor 16 warps, `most` tokens at most."""
        resident = multiprocessors(self.device) * max(1, 16 // num_warps)
        self.rows = share_of(
            self.samples, self.length, max(1, resident // columns), most, self.rows
        )

    def launch(self, function, *arguments, columns: int = 1, **options) -> None:
        """Run `function` with (cu_seqlens, length, tiles, rows per program) and then `arguments`,
        views expanded; nothing happens when there are no tokens. `columns` programs share a tile,
        told apart by program_id(1)."""
        if self.is_empty:
            return
        strides = [n for view in arguments if isinstance(view, VIEWS) for n in view[1:]]
        align = next(a for a in ALIGN if all(stride % a == 0 for stride in strides))
        flat = [self.cu_seqlens, self.length, self.tiles, self.rows]
        for argument in arguments:
            if isinstance(argument, VIEWS):
                flat += argument[0], *(stride // align for stride in argument[1:])
            else:
                flat.append(argument)
        function[(self.samples * self.tiles, columns)](*flat, ALIGN=align, **options)
