"""What every launcher of a kernel over tokens needs.

A token tensor is (B, N, …) or packed (T, …) and reaches a kernel as three arguments: pointer,
batch stride, token stride. A conditioning row is (B, C) or (1, C) and reaches it as two: pointer,
sample stride; heads of tokens (B, N, heads, head_dim) as four, with a head stride. Strides are
passed in units of ALIGN elements, a constant of the kernel, so that the compiler knows them to be
multiples of it and can use 16-byte accesses; lengths and strides are never specialised, so
nothing recompiles when a length changes.
"""

import functools
import inspect
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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


class TokenView(NamedTuple):
    tensor: Tensor | None
    stride_b: int = 0
    stride_n: int = 0


class RowView(NamedTuple):
    tensor: Tensor | None
    stride: int = 0


class HeadView(NamedTuple):
    tensor: Tensor | None
    stride_b: int = 0
    stride_n: int = 0
    stride_h: int = 0


VIEWS = TokenView, RowView, HeadView


def token_view(x: Tensor | None, packed: bool, inner: int = 1) -> TokenView:
    """x by its token strides; copied only if its last `inner` dimensions have gaps."""
    if x is None:
        return TokenView(None)
    width = 1
    for dim in range(1, inner + 1):
        if x.shape[-dim] != 1 and x.stride(-dim) != width:
            x = x.contiguous()
            break
        width *= x.shape[-dim]
    return TokenView(x, 0, x.stride(0)) if packed else TokenView(x, x.stride(0), x.stride(1))


def head_view(x: Tensor | None, packed: bool) -> HeadView:
    """(B, N, heads, head_dim) or (T, heads, head_dim) by its strides; copied only if the
    channels of a head have gaps."""
    if x is None:
        return HeadView(None)
    x, stride_b, stride_n = token_view(x, packed)
    return HeadView(x, stride_b, stride_n, x.stride(-2))


def row_view(row: Tensor | None) -> RowView:
    """A conditioning row by its sample stride, 0 if all samples share one."""
    if row is None:
        return RowView(None)
    row = row if row.stride(-1) == 1 else row.contiguous()
    return RowView(row, 0 if row.shape[0] == 1 else row.stride(0))


class Plan:
    """One launch over the tokens of every sample: samples × tiles programs of `rows` tokens."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, max_length: int, rows: int):
        self.device, self.cu_seqlens, self.rows = x.device, cu_seqlens, rows
        if cu_seqlens is None:
            self.samples, self.length = x.shape[0], x.shape[1]
        else:
            self.samples, self.length = cu_seqlens.shape[0] - 1, max_length
        self.is_empty = x.numel() == 0 or self.length == 0

    @property
    def tiles(self) -> int:
        return -(-self.length // self.rows)

    def spread(self, most: int = 64) -> None:
        """Give each program several tiles, for a reduction over tokens: as many as leave every
        multiprocessor a few programs, `most` tokens at most."""
        fair = self.samples * self.length // (4 * multiprocessors(self.device))
        self.rows *= max(1, min(most, fair) // self.rows)

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


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; those of an H100 elsewhere, so that plans are the same everywhere."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
