"""Calls of csrc/'s operators: how they read tensors, and how much each block has."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .calls import Call, Made
from .shares import multiprocessors, share_of
from .views import In

LATENT_BLOCK = 2048  # elements of latents that a block has, ELEMENTS of csrc/samples.cuh


def one_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The tensors' common dtype; mixed ones, which are rare, are read as float32."""
    dtypes = {x.dtype for x in tensors if x is not None}
    return next(iter(dtypes)) if len(dtypes) == 1 else torch.float32


def read_as(dtype: torch.dtype, args: tuple, views: Iterable[In], flat: bool = False) -> list[In]:
    """The arguments of views in a dtype; csrc/ reads strides itself. `flat` latents (B, …) become
    (B, elements)."""
    return [In(v.index, (), _change(args[v.index], dtype, v.change, flat)) for v in views]


def _change(x: Tensor | None, dtype, copy: Callable | None, flat: bool) -> Callable | None:
    changes = [] if x is None or x.dtype == dtype else [lambda x: x.to(dtype)]
    changes += [] if copy is None else [copy]
    changes += [lambda x: x.flatten(1)] if flat and x is not None else []
    if len(changes) <= 1:
        return changes[0] if changes else None

    def change(x: Tensor) -> Tensor:
        for each in changes:
            x = each(x)
        return x

    return change


def made_as(dtype: torch.dtype, x: Tensor | None) -> Made | None:
    """Shaped as x: written in a dtype, returned in x's."""
    return None if x is None else Made(x.shape, dtype, returned=x.dtype)


def call(
    operator, arguments: Sequence, made: Sequence[Made | None], args: tuple, finish=None,
    is_empty: bool = False,
) -> Call:  # fmt: skip
    return Call(operator.default, arguments, made, args, finish, is_empty)


def blocks_per_sample(elements: int) -> int:
    return -(-elements // LATENT_BLOCK)


def tokens_per_block(
    x: Tensor, samples: int, length: int, resident: int, most: int, step: int = 1
) -> int:
    """`share_of` for a kernel of which a multiprocessor holds `resident` blocks."""
    return share_of(samples, length, resident * multiprocessors(x.device), most, step)
