"""What the launchers of csrc/ share: how its kernels read tensors, decided once for a signature."""

import torch
from torch import Tensor

from .shares import multiprocessors, share_of
from .views import View

LATENT_BLOCK = 2048  # elements of latents that a block has, ELEMENTS of csrc/samples.cuh


def one_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The tensors' common dtype; mixed ones, which are rare, are read as float32."""
    dtypes = {x.dtype for x in tensors if x is not None}
    return next(iter(dtypes)) if len(dtypes) == 1 else torch.float32


class Reader:
    """Brings tensors to what a kernel reads: each to its dtype, and copied where its view says so.

    `parts` are (tensor or None, dtype, view).
    """

    def __init__(self, *parts: tuple[Tensor | None, torch.dtype, View]):
        self.changes = [
            (i, dtype, view.is_copied)
            for i, (x, dtype, view) in enumerate(parts)
            if x is not None and (x.dtype != dtype or view.is_copied)
        ]

    def __call__(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        if not self.changes:
            return tensors
        changed = list(tensors)
        for i, dtype, is_copied in self.changes:
            x = changed[i].to(dtype)
            changed[i] = x.contiguous() if is_copied else x
        return tuple(changed)


def blocks_per_sample(elements: int) -> int:
    return -(-elements // LATENT_BLOCK)


def tokens_per_block(
    x: Tensor, samples: int, length: int, resident: int, most: int, step: int = 1
) -> int:
    """`share_of` for a kernel of which a multiprocessor holds `resident` blocks."""
    return share_of(samples, length, resident * multiprocessors(x.device), most, step)
