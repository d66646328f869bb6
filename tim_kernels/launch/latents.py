"""Kernels over latents: (B, …) tensors, contiguous within a sample, one coefficient a sample.

A tensor reaches a kernel as two arguments, pointer and sample stride; a coefficient vector (B,)
as one, by its plain name, so that not even its alignment selects code. Lengths and strides are
in units of ALIGN elements, a constant of the kernel, as in grid.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from .calls import Call
from .grid import Elements, launch
from .shares import multiprocessors
from .tuning import tuned

UNITS = 8, 1  # what ALIGN may be: 8 elements are 16 bytes of a 2-byte dtype


class LatentGrid:
    """Samples × programs programs, each for `tiles` tiles of a sample's `length`.

    A tile is `block` of them, the op's tuned number of elements with `channels` at each.
    """

    def __init__(self, op: str, x: Tensor, length: int, channels: int = 1):
        elements, self.num_warps = tuned(op, x.device)
        self.block = max(8, elements // channels)
        self.x, self.samples, self.length, self.tiles = x, x.shape[0], length, 1

    @property
    def programs(self) -> int:
        """Of a sample."""
        return -(-self.length // (self.block * self.tiles))

    def spread(self) -> None:
        """Give each program as many tiles as leave every multiprocessor eight programs."""
        self.tiles = max(1, self.samples * self.programs // (8 * multiprocessors(self.x.device)))

    def launch(self, function, arguments, made, args, finish=None, **options) -> Call:
        """Of `function` with (length, programs) and then `arguments`."""
        programs = self.samples * self.programs if self.x.numel() else 0
        arguments = Elements(self.length), self.programs, *arguments
        options |= dict(BLOCK=self.block, num_warps=self.num_warps)
        return launch(function, (programs,), arguments, made, args, finish, UNITS, **options)


@triton.jit
def locate(length, programs, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """A program's sample, the offsets (BLOCK,) of its tile and which of them are inside."""
    program = tl.program_id(0)
    sample = (program // programs).to(tl.int64)
    offset = (program % programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return sample, offset, offset < tl.cast(length, tl.int64) * ALIGN


@triton.jit
def load(
    ptr, sample, stride, offset, mask, ALIGN: tl.constexpr, dtype: tl.constexpr = tl.float32
):  # fmt: skip
    """Elements of a sample in `dtype`; zeros where masked or if ptr is None."""
    if ptr is None:
        return tl.zeros_like(offset).to(dtype)
    else:
        value = tl.load(ptr + sample * stride * ALIGN + offset, mask=mask, other=0.0)
        return value if value.dtype == dtype else value.to(tl.float32).to(dtype)


@triton.jit
def store(ptr, sample, stride, offset, mask, value, ALIGN: tl.constexpr):
    """Write elements of a sample; nothing if ptr is None."""
    if ptr is not None:
        if ptr.dtype.element_ty != value.dtype:
            value = value.to(tl.float32)
        tl.store(ptr + sample * stride * ALIGN + offset, value, mask=mask)


@triton.jit
def scaled(coefficients, row, value):
    """coefficients[row]·value; zero if coefficients is None."""
    if coefficients is None:
        return tl.zeros_like(value)
    else:
        return tl.load(coefficients + row).to(value.dtype) * value
