"""How kernels reach the tensors of a call: by a pointer and a few strides, changed first where they
must be. All of it follows from shapes, strides and dtypes, so it is worked out once a signature.

A token tensor is (B, N, …) or packed (T, …): a batch and a token stride. Heads of tokens
(B, N, heads, head_dim) have a head stride besides. A conditioning row is (B, C) or (1, C): a
sample stride, 0 if all samples share one; that of each token is (B, N, C) or packed (1, T, C).
Latents are (B, …), contiguous within a sample: a sample stride. Elements that must lie side by side
and do not are copied.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class In(NamedTuple):
    """Argument `index` of a call, None or a tensor: the strides that a kernel gets beside it, None
    of a dimension that it lacks, and what is done to it first."""

    index: int
    strides: tuple[int | None, ...] = ()
    change: Callable[[Tensor], Tensor] | None = None


def pointers(*indices: int) -> list[In]:
    """Arguments that are contiguous, or whose gaps the kernel knows."""
    return [In(index) for index in indices]


def view_tokens(args: tuple, *indices: int, is_packed: bool) -> list[In]:
    """(B, N, C), or packed (T, C), by (batch, token)."""
    return [_view(args, i, 1, lambda s: (0, s[0]) if is_packed else s[:2], 2) for i in indices]


def view_heads(args: tuple, *indices: int, is_packed: bool) -> list[In]:
    """(B, N, heads, head_dim) or (T, heads, head_dim) by (batch, token, head)."""
    return [_view(args, i, 1, lambda s: (0, *s[:2]) if is_packed else s[:3], 3) for i in indices]


def view_cond(args: tuple, *indices: int) -> list[In]:
    """Conditioning rows by (sample,)."""
    return [_view(args, i, 1, lambda s: s[:1], 1) for i in indices]


def view_modulation(args: tuple, *indices: int) -> list[In]:
    """Conditioning rows by (sample, None), that of each token by (sample, token)."""
    views = []
    for i in indices:
        if args[i] is not None and args[i].ndim == 3:
            views += view_tokens(args, i, is_packed=False)
        else:
            (row,) = view_cond(args, i)
            views.append(row._replace(strides=(*row.strides, None)))
    return views


def view_latents(args: tuple, *indices: int) -> list[In]:
    """(B, …) by (sample,)."""
    ranks = [0 if args[i] is None else args[i].ndim for i in indices]
    return [_view(args, i, n - 1, lambda s: s[:1], 1) for i, n in zip(indices, ranks, strict=True)]


def view_vectors(args: tuple, *indices: int) -> list[In]:
    """Contiguous: a pointer alone."""
    is_copied = (args[i] is not None and not args[i].is_contiguous() for i in indices)
    return [In(i, (), contiguous if c else None) for i, c in zip(indices, is_copied, strict=True)]


def view_matrix(args: tuple, *indices: int) -> list[In]:
    """(…, C) by the one stride (row,) between rows, wherever they lie."""
    return [In(i, *_rows(args[i])) for i in indices]


def _rows(x: Tensor | None) -> tuple[tuple[int], Callable | None]:
    if x is None:
        return (0,), None
    strides, change = dense(x, 1)
    step = strides[-2] if x.ndim > 1 else x.shape[-1]
    expected = step
    for size, stride in zip(reversed(x.shape[:-1]), reversed(strides[:-1]), strict=True):
        if size != 1 and stride != expected:
            return (x.shape[-1],), contiguous
        expected *= size
    return (step,), change


def _view(args: tuple, index: int, inner: int, pick: Callable, count: int) -> In:
    """`count` strides that `pick` takes of a tensor whose last `inner` dimensions are dense."""
    if args[index] is None:
        return In(index, (0,) * count)
    strides, change = dense(args[index], inner)
    # of a dimension of one, any: contiguous tensors that differ there share a plan, and its ALIGN
    strides = [
        0 if n == 1 else stride for n, stride in zip(args[index].shape, strides, strict=True)
    ]
    return In(index, tuple(pick(strides)), change)


def dense(x: Tensor, inner: int) -> tuple[tuple[int, ...], Callable | None]:
    """The strides of x if its last `inner` dimensions are contiguous, else those of a copy."""
    width = 1
    for dim in range(-1, -inner - 1, -1):
        if x.shape[dim] != 1 and x.stride(dim) != width:
            return contiguous_strides(x.shape), contiguous
        width *= x.shape[dim]
    return x.stride(), None


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()
