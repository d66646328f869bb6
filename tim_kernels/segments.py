"""Sequences of different lengths packed end to end."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .dispatch.torch_private import is_functorch_wrapped, register_pytree

LONGEST = torch.iinfo(torch.int32).max


@dataclass(frozen=True, eq=False)
class Segments:
    """S sequences packed end to end in one (T, …) tensor.

    Sequence s holds tokens cu_seqlens[s] … cu_seqlens[s + 1] − 1. The values are checked once,
    here, and a GPU is waited for; with `total`, or by `from_lengths`, it is not. The caller vouches
    for values on a GPU beside a `total`, for meta and fake tensors, for those that torch.compile or
    torch.func traces, during the capture of a CUDA graph, and for a tensor that is changed later:
    wrong ones make kernels read and write memory that is not theirs.

    Args:
        cu_seqlens: int32 (S + 1,) on the tokens' device, from 0 to T, never falling.
        max_length: an upper bound of the longest.
        total: T; read from the tensor unless given, None where it cannot be.

    Attributes:
        lengths: of every sequence, on the host; None where the tensor was not read.

    Raises:
        ValueError: a dtype, shape or values that do not fit. Operations raise it for tensors that
            have not `total` tokens.

    Example:
        >>> segments = Segments(torch.tensor([0, 4, 10], dtype=torch.int32), max_length=6)
        >>> segments.total
        10
    """

    cu_seqlens: Tensor
    max_length: int
    total: int | None = None
    lengths: tuple[int, ...] | None = field(default=None, init=False)

    def __post_init__(self):
        cu, total = self.cu_seqlens, self.total
        _check_offsets(cu)
        max_length = _checked_length("max_length", self.max_length)
        if total is not None:
            total = _checked_length("total", total)
        if torch.compiler.is_compiling():  # there is nothing to read, and nobody has other integers
            return
        if _is_readable(cu) and (total is None or cu.is_cpu):
            lengths = _read(cu, max_length, total)
            total = sum(lengths)
            object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "max_length", max_length)
        object.__setattr__(self, "total", total)

    @classmethod
    def from_lengths(
        cls, lengths: Iterable[int], device: torch.device | str | int | None = None
    ) -> "Segments":
        """Segments of these lengths, made on the host and copied to `device`.

        Raises:
            ValueError: a negative length, or more than 2³¹ − 1 tokens.

        Example:
            >>> Segments.from_lengths([4, 6]).cu_seqlens
            tensor([ 0,  4, 10], dtype=torch.int32)
        """
        lengths = [_checked_length("a length", length) for length in lengths]
        ends = [0, *accumulate(lengths)]
        if ends[-1] > LONGEST:
            raise ValueError(f"lengths must sum to {LONGEST} at most, got {ends[-1]}")
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        return cls(cu_seqlens, max(lengths, default=0), ends[-1])._of(lengths)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Segments":
        """The same on another device."""
        moved = self.cu_seqlens.to(device, non_blocking=non_blocking)
        return Segments(moved, self.max_length, self.total)._of(self.lengths)

    def _of(self, lengths: Iterable[int] | None) -> "Segments":
        object.__setattr__(self, "lengths", None if lengths is None else tuple(lengths))
        return self


register_pytree(Segments, ("cu_seqlens", "max_length", "total", "lengths"))


def _check_offsets(cu: Tensor) -> None:
    if not isinstance(cu, Tensor):
        raise ValueError(f"cu_seqlens must be an int32 tensor (S + 1,), got a {type(cu).__name__}")
    if cu.ndim != 1 or cu.dtype != torch.int32 or cu.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be int32 (S + 1,), got {cu.dtype} {tuple(cu.shape)}")
    if cu.shape[0] > 1 and cu.stride(0) != 1:
        raise ValueError(f"cu_seqlens must be contiguous, got stride {cu.stride(0)}")


def _checked_length(name: str, length: int) -> int:
    if not isinstance(length, (int, torch.SymInt)):
        try:
            length = operator.index(length)
        except TypeError:
            kind = type(length).__name__
            raise ValueError(f"{name} must be an integer, got a {kind}") from None
    if length < 0:
        raise ValueError(f"{name} must not be negative, got {length}")
    return length


def _is_readable(cu: Tensor) -> bool:
    if type(cu) is not Tensor or cu.is_meta or is_functorch_wrapped(cu):
        return False
    return not (cu.is_cuda and torch.cuda.is_current_stream_capturing())


def _read(cu: Tensor, max_length: int, total: int | None) -> tuple[int, ...]:
    """The lengths, of values that fit."""
    ends = cu.tolist()
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {ends[0]}")
    for before, after in pairwise(ends):
        if after < before:
            raise ValueError(f"cu_seqlens must not fall, got {after} after {before}")
        if after - before > max_length:
            raise ValueError(f"max_length must be {after - before}, or more, got {max_length}")
    if total not in (None, ends[-1]):
        raise ValueError(f"total must be {ends[-1]}, the last of cu_seqlens, got {total}")
    return tuple(after - before for before, after in pairwise(ends))


def packing(segments: Segments | None, name: str, tokens: Tensor) -> tuple[Tensor | None, int]:
    """As operators take it: cu_seqlens, None without segments, and max_length; for these tokens."""
    if segments is None:
        return None, 0
    if not isinstance(segments, Segments):
        raise ValueError(f"segments must be a {Segments}, got a {type(segments)}")
    total = segments.total
    if total is not None and (tokens.ndim == 0 or tokens.shape[0] != total):
        raise ValueError(
            f"{name} must have the {total} tokens of its segments, packed ({total}, …); "
            f"got {tuple(tokens.shape)}"
        )
    return segments.cu_seqlens, segments.max_length


def unpacked(cu_seqlens: Tensor | None, max_length: int, tokens: Tensor) -> Segments | None:
    """What `packing` took apart."""
    return None if cu_seqlens is None else Segments(cu_seqlens, max_length, tokens.shape[0])


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
