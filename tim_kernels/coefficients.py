"""Vectors of one number a sample, (B,), and the latents (B, …) that they multiply."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .segments import check_same_device


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


def check_latents(name: str, x: Tensor) -> None:
    """Refuse what is no tensor of samples."""
    check_same_device(name, x, x)
    if x.ndim < 2:
        raise ValueError(f"{name} must be (B, …) with two dimensions or more, got {tuple(x.shape)}")


def check_like(name: str, tensor: Tensor, samples: int, x_name: str, x: Tensor) -> None:
    """Refuse what is not `samples` latents of the shape of x's, on its device."""
    shape = (samples, *x.shape[1:])
    if tensor.ndim != x.ndim or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be {shape} for {x_name} of {tuple(x.shape)}; got {tuple(tensor.shape)}"
        )
    check_same_device(name, tensor, x)


def check_vector(name: str, vector: Tensor, samples: int, x: Tensor) -> None:
    """Refuse a coefficient that is not one number for each of `samples` samples."""
    if vector.ndim != 1 or vector.shape[0] != samples:
        raise ValueError(
            f"{name} must be ({samples},), one number a sample; got {tuple(vector.shape)}"
        )
    check_same_device(name, vector, x)
