"""Calls of kernels: planned once for a signature, made with nothing but the call's arguments."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .views import In


class Out(NamedTuple):
    """Tensor `index` of those that a call makes, or a view of it, where a kernel writes."""

    index: int
    strides: tuple[int, ...] = ()
    change: Callable[[Tensor], Tensor] | None = None


class Made(NamedTuple):
    """A tensor that a call makes and returns, in the end as `returned` if that is another dtype.
    Where a call has None instead, the kernel gets None and the caller an empty tensor."""

    shape: Sequence[int]
    dtype: torch.dtype
    is_zero: bool = False  # at first
    returned: torch.dtype | None = None


def like(x: Tensor | None, needed: object = True) -> Made | None:
    """Shaped as x, unless x or what it is needed for is None."""
    return None if x is None or needed is None else Made(x.shape, x.dtype)


class Call:
    """`start(*arguments)`: of the arguments, an `In` is one of the call's, an `Out` one of those
    `made`, anything else is as it is. Returns those made, through `finish` if given. An empty call
    starts nothing; what it makes is zero."""

    def __init__(
        self,
        start: Callable,
        arguments: Sequence,
        made: Sequence[Made | None],
        args: tuple,
        finish: Callable | None = None,
        is_empty: bool = False,
    ):
        places = [(slot, a) for slot, a in enumerate(arguments) if isinstance(a, (In, Out))]
        self.start, self.is_empty = start, is_empty
        self.flat = [None if isinstance(a, (In, Out)) else a for a in arguments]
        self.inputs = [(slot, a.index) for slot, a in places if isinstance(a, In)]
        self.outputs = [(slot, a.index) for slot, a in places if isinstance(a, Out)]
        self.changes = [(slot, a.change) for slot, a in places if a.change is not None]
        self.made = [_maker(each, args, is_empty) for each in made]
        self.returned = [
            (i, m.returned) for i, m in enumerate(made) if m and m.returned not in (None, m.dtype)
        ]
        self.missing = [i for i, each in enumerate(made) if each is None]
        first = next(x for x in args if isinstance(x, Tensor))
        self.dtype, self.device = first.dtype, first.device
        self.finish = finish

    def __call__(self, *args):
        made = [make(args) for make in self.made]
        if not self.is_empty:
            flat = self.flat.copy()
            for slot, index in self.inputs:
                flat[slot] = args[index]
            for slot, index in self.outputs:
                flat[slot] = made[index]
            for slot, change in self.changes:
                if flat[slot] is not None:
                    flat[slot] = change(flat[slot])
            self.start(*flat)
        for i in self.missing:
            made[i] = torch.empty(0, dtype=self.dtype, device=self.device)
        for i, dtype in self.returned:
            made[i] = made[i].to(dtype)
        if self.finish is not None:
            return self.finish(*made)
        return made[0] if len(made) == 1 else tuple(made)


def _maker(made: Made | None, args: tuple, is_empty: bool) -> Callable:
    """What makes it from a call's arguments. Nothing is as cheap on the host as `empty_like`."""
    if made is None:
        return lambda args: None
    shape, dtype = torch.Size(made.shape), made.dtype
    if not made.is_zero and not is_empty:
        for i, x in enumerate(args):
            if isinstance(x, Tensor) and x.shape == shape and x.dtype == dtype:
                layout = {} if x.is_contiguous() else dict(memory_format=torch.contiguous_format)
                return lambda args: torch.empty_like(args[i], **layout)
    make = torch.zeros if made.is_zero or is_empty else torch.empty
    device = next(x for x in args if isinstance(x, Tensor)).device
    return lambda args: make(shape, dtype=dtype, device=device)
