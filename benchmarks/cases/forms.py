"""Calls that other models make: conditioning of each token (Wan), a norm with weight and bias
(PixArt, Flux), RMSNorm with a scale alone (Lumina). TiM makes none, so its tiles are not chosen by
them."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tim_kernels as ops

from .calls import Call, maker
from .shapes import Shape


def calls(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Call]:
    """Of unpacked tokens."""
    make = maker(dtype, device)
    tokens, C = (shape.batch, math.prod(shape.grid), shape.width), shape.width
    x, branch, gate, shift, scale = (make(*tokens) for _ in range(5))
    rows = [make(shape.batch, 1, C) for _ in range(3)]
    weight, bias = make(C), make(C)
    yield Call(
        "gated_residual_ada_layer_norm of each token",
        ops.gated_residual_ada_layer_norm,
        (x, branch, gate, shift, scale),
        _both,
    )
    yield Call(
        "gated_residual_ada_layer_norm with weight and bias",
        lambda *args: ops.gated_residual_ada_layer_norm(*args[:5], weight=args[5], bias=args[6]),
        (x, branch, *rows, weight, bias),
        _both,
    )
    yield Call(
        "ada_layer_norm by rms",
        lambda x, scale, weight: ops.ada_layer_norm(x, None, scale, weight=weight, norm="rms"),
        (x, rows[0], weight),
        lambda x, scale, weight: F.rms_norm(x, (C,), weight, eps=1e-6) * (1 + scale),
    )


def _both(x, branch, gate, shift, scale, weight=None, bias=None):
    x = x + gate * branch
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6) * (1 + scale) + shift
