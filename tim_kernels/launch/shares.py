"""How much of the tokens each program has."""

import functools

import torch
from torch import Tensor

MOST = 64  # tokens to reduce over: partial sums are then a few percent of what is read


def samples_and_length(x: Tensor, cu_seqlens: Tensor | None, max_length: int) -> tuple[int, int]:
    """How many samples there are, and how many tokens the longest has at most."""
    if cu_seqlens is None:
        return x.shape[0], x.shape[1]
    return cu_seqlens.shape[0] - 1, max_length


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; those of an H100 elsewhere, so that plans are the same everywhere."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def share_of(samples: int, length: int, resident: int, most: int, step: int = 1) -> int:
    """Tokens a program: as few as let all programs run at once, of which the device holds
    `resident`, or, where that is more than `most`, run in even rounds. In whole steps."""
    most = max(step, most // step * step)
    rounds = max(1, samples * length // (resident * most))
    while True:
        programs = max(1, rounds * resident // max(1, samples))  # a sample
        tokens = -(-length // (programs * step)) * step
        if tokens <= most:
            return max(step, tokens)
        rounds += 1


def token_grid(
    x: Tensor, cu_seqlens: Tensor | None, max_length: int, tokens: int
) -> tuple[int, int, int]:
    """Programs of `tokens` tokens of one sample each, none for an empty x; the longest sample's
    length, and its programs."""
    samples, length = samples_and_length(x, cu_seqlens, max_length)
    tiles = -(-length // tokens)
    return samples * tiles if x.numel() else 0, length, tiles


def tokens_to_reduce(
    x: Tensor, cu_seqlens: Tensor | None, max_length: int, num_warps: int, step: int,
    columns: int = 1,
) -> int:  # fmt: skip
    """Tokens a program for a reduction over them, whole steps: as few as leave every
    multiprocessor 16 warps, where `columns` programs share them."""
    samples, length = samples_and_length(x, cu_seqlens, max_length)
    resident = multiprocessors(x.device) * max(1, 16 // num_warps)
    return share_of(samples, length, max(1, resident // columns), MOST, step)
