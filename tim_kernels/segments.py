"""Sequences of different lengths packed end to end."""

from typing import NamedTuple

from torch import Tensor


class Segments(NamedTuple):
    """Sequences packed end to end in one (T, …) tensor.

    cu_seqlens is int32 (S + 1,) on the tokens' device, from 0 to T: sequence s holds tokens
    cu_seqlens[s] … cu_seqlens[s + 1] − 1. max_length is an upper bound of the longest.
    """

    cu_seqlens: Tensor
    max_length: int


def packing(segments: Segments | None) -> tuple[Tensor | None, int]:
    """As operators take it: cu_seqlens, None without segments, and max_length."""
    return (None, 0) if segments is None else (segments.cu_seqlens, segments.max_length)


def per_token(row: Tensor, tokens: Tensor, segments: Segments | None) -> Tensor:
    """One row a sample, (B, …) or (1, …), shaped to broadcast over that sample's tokens."""
    if segments is None:
        return row.unsqueeze(1)
    if row.shape[0] == 1:
        return row
    return row.repeat_interleave(segments.cu_seqlens.diff(), dim=0, output_size=tokens.shape[0])
