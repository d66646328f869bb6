"""How kernels reach tensors: by a pointer and a few strides, copied first where elements that must
lie side by side have gaps.

A token tensor is (B, N, …) or packed (T, …): a batch and a token stride. Heads of tokens
(B, N, heads, head_dim) have a head stride besides. A conditioning row is (B, C) or (1, C): a
sample stride, 0 if all samples share one. Latents are (B, …), contiguous within a sample: a sample
stride. All of it follows from shape and strides alone, so it is worked out once for a signature.
"""

from typing import NamedTuple

from torch import Tensor


class View(NamedTuple):
    """The strides of a tensor, or of its contiguous copy."""

    strides: tuple[int, ...] = ()
    is_copied: bool = False


POINTER = View()  # of a tensor that the kernel knows to be contiguous


def view_tokens(x: Tensor | None, is_packed: bool, inner: int = 1) -> View:
    """By (batch, token); the last `inner` dimensions lie side by side."""
    if x is None:
        return View((0, 0))
    strides, is_copied = _dense(x, inner)
    return View((0, strides[0]) if is_packed else strides[:2], is_copied)


def view_heads(x: Tensor | None, is_packed: bool) -> View:
    """(B, N, heads, head_dim) or (T, heads, head_dim) by (batch, token, head)."""
    if x is None:
        return View((0, 0, 0))
    strides, is_copied = _dense(x, 1)
    return View((0, *strides[:2]) if is_packed else strides[:3], is_copied)


def view_cond(row: Tensor | None) -> View:
    """A conditioning row by (sample,)."""
    if row is None:
        return View((0,))
    strides, is_copied = _dense(row, 1)
    return View((0 if row.shape[0] == 1 else strides[0],), is_copied)


def view_matrix(x: Tensor | None) -> View:
    """(…, C) by the one stride (row,) between rows, wherever they lie."""
    if x is None:
        return View((0,))
    strides, is_copied = _dense(x, 1)
    step = strides[-2] if x.ndim > 1 else x.shape[-1]
    expected = step
    for size, stride in zip(reversed(x.shape[:-1]), reversed(strides[:-1]), strict=True):
        if size != 1 and stride != expected:
            return View((x.shape[-1],), True)
        expected *= size
    return View((step,), is_copied)


def view_latents(x: Tensor | None) -> View:
    """(B, …) by (sample,)."""
    if x is None:
        return View((0,))
    strides, is_copied = _dense(x, x.ndim - 1)
    return View(strides[:1], is_copied)


def view_vector(vector: Tensor | None) -> View:
    """Contiguous: a pointer alone."""
    return POINTER if vector is None or vector.is_contiguous() else View((), True)


def _dense(x: Tensor, inner: int) -> tuple[tuple[int, ...], bool]:
    """Strides of x if its last `inner` dimensions are contiguous, else of a copy of it."""
    width = 1
    for dim in range(-1, -inner - 1, -1):
        if x.shape[dim] != 1 and x.stride(dim) != width:
            return _contiguous(x.shape), True
        width *= x.shape[dim]
    return x.stride(), False


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))
