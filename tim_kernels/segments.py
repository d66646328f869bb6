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


def as_row(row: Tensor | None, x: Tensor, segments: Segments | None) -> Tensor | None:
    """A view (S, C) or (1, C) of conditioning (C,), (S, 1, C) or (1, 1, C) for the S samples of
    tokens x; anything else as it is."""
    if row is None or row.ndim == 2:
        return row
    if row.ndim == 1:
        return row.unsqueeze(0)
    is_row = row.ndim == 3 and row.shape[1] == 1 and row.shape[0] in (1, *_samples(x, segments))
    return row.squeeze(1) if is_row else row


def as_modulation(cond: Tensor | None, x: Tensor, segments: Segments | None) -> Tensor | None:
    """`as_row`, or a view of conditioning of each token as (B, N, C), or packed as (1, T, C).

    A shape that can be read as either is of one row a sample, or one for all.
    """
    if cond is None or (cond.ndim == 2 and segments is None):
        return cond
    cond = as_row(cond, x, segments)
    if segments is None:  # (1, N, C) is of each token and for all samples
        is_shared = cond.ndim == 3 and cond.shape[0] == 1 and cond.shape[1:] == x.shape[1:]
        return cond.expand(x.shape) if is_shared else cond
    is_of_token = cond.shape == x.shape and cond.shape[0] not in (1, *_samples(x, segments))
    return cond.unsqueeze(0) if is_of_token else cond


def _samples(x: Tensor, segments: Segments | None) -> tuple[int, ...]:
    """Their number; none of an x without dimensions, which no op takes."""
    return x.shape[:1] if segments is None else (segments.cu_seqlens.shape[0] - 1,)
