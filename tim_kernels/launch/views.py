"""Tensors as kernels see them: a pointer and its strides, copied only where channels have gaps.

A token tensor is (B, N, …) or packed (T, …) and has a batch and a token stride. A conditioning row
is (B, C) or (1, C) and has a sample stride; heads of tokens (B, N, heads, head_dim) have a head
stride besides. Latents are (B, …), contiguous within a sample, with a sample stride.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


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


class SampleView(NamedTuple):
    tensor: Tensor | None
    stride: int = 0


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


def rows_of(x: Tensor) -> Tensor:
    """x as (rows, width), in place if its leading dimensions have one stride between them."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def sample_view(x: Tensor | None) -> SampleView:
    """Latents (B, …) as (B, elements) by their sample stride; copied only if a sample has gaps."""
    if x is None:
        return SampleView(None)
    flat = x.flatten(1)
    flat = flat if flat.stride(1) == 1 or flat.shape[1] < 2 else flat.contiguous()
    return SampleView(flat, flat.stride(0))


def vector(coefficient: Tensor | None) -> Tensor | None:
    return None if coefficient is None else coefficient.contiguous()


def samples_and_length(x: Tensor, cu_seqlens: Tensor | None, max_length: int) -> tuple[int, int]:
    """How many samples there are, and how many tokens the longest has at most."""
    if cu_seqlens is None:
        return x.shape[0], x.shape[1]
    return cu_seqlens.shape[0] - 1, max_length


def share_of(samples: int, length: int, resident: int, most: int, step: int = 1) -> int:
    """Tokens a program: as few as let all programs run at once, of which the device holds
    `resident`, or, where that is more than `most`, run in even rounds. In whole steps."""
    most = max(step, most // step * step)
    rounds = max(1, samples * length // (resident * most))
    while True:
        programs = max(1, rounds * resident // max(1, samples))  # a sample
        rows = -(-length // (programs * step)) * step
        if rows <= most:
            return max(step, rows)
        rounds += 1


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; those of an H100 elsewhere, so that plans are the same everywhere."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
