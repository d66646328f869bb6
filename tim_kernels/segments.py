from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_floating


class Segments(NamedTuple):
    """Sequences packed end to end in one (T, …) tensor.

    cu_seqlens is int32 (S + 1,) on the tokens' device, from 0 to T: sequence s holds tokens
    cu_seqlens[s] … cu_seqlens[s + 1] − 1. max_length is an upper bound of the longest.
    """

    cu_seqlens: Tensor
    max_length: int


def rows_per_token(row: Tensor, tokens: Tensor, segments: Segments | None) -> Tensor:
    """One row a sample, (B, …) or (1, …), shaped to broadcast over that sample's tokens."""
    if segments is None:
        return row.unsqueeze(1)
    if row.shape[0] == 1:
        return row
    return row.repeat_interleave(segments.cu_seqlens.diff(), dim=0, output_size=tokens.shape[0])


def check_tokens(name: str, x: Tensor, segments: Segments | None) -> int:
    """Refuse what is no token tensor; returns the number of samples."""
    if segments is None:
        if x.ndim < 3:
            raise ValueError(
                f"{name} must be (B, N, …), got {tuple(x.shape)}; packed tokens (T, …) "
                "need `segments`"
            )
        return x.shape[0]
    cu = segments.cu_seqlens
    if cu.ndim != 1 or cu.dtype != torch.int32 or cu.shape[0] < 1 or cu.device != x.device:
        raise ValueError(
            f"segments.cu_seqlens must be int32 (S + 1,) on {x.device}; "
            f"got {cu.dtype} {tuple(cu.shape)} on {cu.device}"
        )
    if cu.shape[0] > 1 and cu.stride(0) != 1:
        raise ValueError(f"segments.cu_seqlens must be contiguous, got stride {cu.stride(0)}")
    if segments.max_length < 0:
        raise ValueError(f"segments.max_length must not be negative, got {segments.max_length}")
    return cu.shape[0] - 1


def check_row(name: str, row: Tensor, samples: int, width: int, x: Tensor) -> None:
    """Refuse a conditioning row that is not (samples, width) or (1, width)."""
    if row.ndim != 2 or row.shape[0] not in (1, samples) or row.shape[1] != width:
        raise ValueError(
            f"{name} must be ({samples}, {width}) or (1, {width}), got {tuple(row.shape)}"
        )
    check_same_device(name, row, x)


def check_same_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like the tokens, got {tensor.device}")
    check_floating(name, tensor)
