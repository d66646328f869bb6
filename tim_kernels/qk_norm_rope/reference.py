import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulation_dtype

ORDERS = ("upstream", "grid")


def grid_positions(height: int, width: int, order: str, device=None) -> Tensor:
    """(height·width, 2) int64 positions of the row-major tokens of a height×width grid.

    "grid" gives token n its (column, row) = (n mod width, n div width). "upstream" gives
    (n mod height, n div height), which is the same only on a square grid: the released
    weights were trained so.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    n = torch.arange(height * width, device=device)
    divisor = width if order == "grid" else height
    return torch.stack((n % divisor, n // divisor), dim=-1)


def rope_tables(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the axial RoPE angles, float32 (..., head_dim), from (..., 2) positions.

    The first half of the head turns by the first position, the second half by the second;
    channels 2j and 2j + 1 of a half share the frequency 10000^(−2j/(head_dim/2)).
    """
    if head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4 for 2-D RoPE, got {head_dim}")
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, device=positions.device, dtype=torch.float32) / half
    freqs = 1.0 / (10000.0**exponent)  # (head_dim/4,)
    angles = positions.to(torch.float32).unsqueeze(-1) * freqs  # (..., 2, head_dim/4)
    angles = angles.flatten(-2).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def rotate_pairs(x: Tensor) -> Tensor:
    """(x0, x1, x2, x3, …) → (−x1, x0, −x3, x2, …)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-odd, even), dim=-1).flatten(-2)


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tables: tuple[Tensor, Tensor] | None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """RoPE(LN(x + shift)) for (B, N, heads, head_dim).

    shift is (B, heads·head_dim); no weight means no norm, no tables no rotation.
    Returns x's dtype.
    """
    dtype = accumulation_dtype(x)
    out = x.to(dtype)
    if shift is not None:
        out = out + shift.to(dtype).unflatten(-1, x.shape[-2:]).unsqueeze(1)
    if weight is not None:
        out = F.layer_norm(out, x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    if tables is not None:
        cos, sin = (table.to(dtype).unsqueeze(-2) for table in tables)
        out = out * cos + rotate_pairs(out) * sin
    return out.to(x.dtype)
