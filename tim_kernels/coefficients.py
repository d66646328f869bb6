"""Vectors of one number a sample, (B,), and the latents (B, …) that they multiply."""

from collections.abc import Iterable

import torch
from torch import Tensor


def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) → (B, 1, 1, …), to multiply a tensor shaped as `like`."""
    return coefficient.view(-1, *[1] * (like.ndim - 1))


def cast(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def weighted_sum(coefficients: Iterable[Tensor | None], tensors: Iterable[Tensor | None]) -> Tensor:
    """Σ coefficient·tensor over the pairs whose tensor is given."""
    terms = [
        per_sample(c, tensor) * tensor
        for c, tensor in zip(coefficients, tensors, strict=True)
        if tensor is not None
    ]
    return sum(terms[1:], terms[0])
