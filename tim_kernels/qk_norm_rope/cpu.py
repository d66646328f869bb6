"""QK-norm and RoPE on a CPU: pairs of channels turn as complex numbers, by a table that is kept."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch.plans import made_apart
from . import reference


@functools.lru_cache(maxsize=64)
def _turns(grid: tuple[int, int], order: str, head_dim: int) -> Tensor:
    """exp(i·angle) of a grid's tokens, complex64 (N, 1, head_dim/2)."""

    def make() -> Tensor:
        angles = reference.rope_angles(reference.grid_positions(*grid, order), head_dim)
        return torch.polar(torch.ones_like(angles), angles).flatten(-2).unsqueeze(-2)

    return made_apart(make)


def run(x, weight, bias, shift, grid, order: str, eps: float) -> Tensor:
    """RoPE(LN(x + shift)) of (B, N, heads, head_dim) in x's dtype, computed in float32."""
    out = x.float() if shift is None else x + shift.float().unflatten(-1, x.shape[-2:])[:, None]
    if weight is not None:
        bias = None if bias is None else bias.float()
        out = F.layer_norm(out, x.shape[-1:], weight.float(), bias, eps)
    if grid is not None:
        pairs = torch.view_as_complex(out.unflatten(-1, (-1, 2)))
        out = torch.view_as_real(pairs * _turns(grid, order, x.shape[-1])).flatten(-2)
    return out.to(x.dtype)
