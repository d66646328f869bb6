"""Vectors of one number a sample, (B,), and the latents (B, …) that they multiply."""

from collections.abc import Iterable

import torch
from torch import Tensor


def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) → (B, 1, 1, …), to multiply a tensor shaped as `like`."""
    return coefficient.view(-1, *[1] * (like.ndim - 1))


def cast(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def weighted_sum(
    coefficients: Iterable[Tensor | None],
    tensors: Iterable[Tensor | None],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Σ coefficient·tensor over the pairs whose tensor is given; in `dtype`, if given, which is at
    least as wide as the tensors': a coefficient of it widens what it multiplies."""
    total = None
    for coefficient, tensor in zip(coefficients, tensors, strict=True):
        if tensor is not None:
            coefficient = coefficient if dtype is None else coefficient.to(dtype)
            term = per_sample(coefficient, tensor) * tensor
            total = term if total is None else total + term
    return total


def scaled_sum(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a·x + b·y of latents, by two of PyTorch's operations instead of three."""
    return torch.addcmul(per_sample(a, x) * x, per_sample(b, y), y)
