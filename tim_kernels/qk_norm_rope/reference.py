import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulation_dtype
from ..names import ORDERS, RopeOrder
from ..segments import Segments, per_token

THETA = 10000.0


def grid_positions(
    height: int, width: int, order: RopeOrder, device: torch.device | str | None = None
) -> Tensor:
    """(height·width, 2) int64 positions of the row-major tokens of a height×width grid.

    "grid" gives token n its (column, row) = (n mod width, n div width). "upstream" gives
    (n mod height, n div height), which is the same only on a square grid: the released
    weights were trained so.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    n = torch.arange(height * width, device=device)
    return positions_of(n, width if order == "grid" else height)


def positions_of(n: Tensor, period: Tensor | int) -> Tensor:
    """(n mod period, n div period), (..., 2)."""
    return torch.stack((n % period, n // period), dim=-1)


def token_positions(tokens: Tensor, period: Tensor | int, segments: Segments | None) -> Tensor:
    """Positions of every token by its index in its sample, (N, 2), (B, N, 2) or (T, 2).

    period is one for all samples, or int32 with one per sample.
    """
    if segments is None:
        n = torch.arange(tokens.shape[1], device=tokens.device)
        return positions_of(n, period.unsqueeze(1) if isinstance(period, Tensor) else period)
    T, cu = tokens.shape[0], segments.cu_seqlens
    first = torch.repeat_interleave(cu[:-1], cu.diff(), output_size=T)
    if isinstance(period, Tensor):
        period = torch.repeat_interleave(period, cu.diff(), output_size=T)
    return positions_of(torch.arange(T, device=tokens.device) - first, period)


def frequencies(head_dim: int, device=None) -> Tensor:
    """10000^(−2j/(head_dim/2)), float32 (head_dim/4,)."""
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, device=device, dtype=torch.float32) / half
    return 1.0 / (THETA**exponent)


def rope_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Of the pairs of channels, float32 (..., 2, head_dim/4), from (..., 2) positions."""
    return positions.to(torch.float32).unsqueeze(-1) * frequencies(head_dim, positions.device)


def rope_tables(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the axial RoPE angles, float32 (..., head_dim), from (..., 2) positions.

    The first half of the head turns by the first position, the second half by the second;
    channels 2j and 2j + 1 of a half share the frequency 10000^(−2j/(head_dim/2)).
    """
    if head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4 for 2-D RoPE, got {head_dim}")
    angles = rope_angles(positions, head_dim).flatten(-2).repeat_interleave(2, dim=-1)
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
    segments: Segments | None = None,
) -> Tensor:
    """RoPE(LN(x + shift)) for (B, N, heads, head_dim), or (T, heads, head_dim) packed.

    shift is (B, heads·head_dim); no weight means no norm, no tables no rotation.
    Returns x's dtype.
    """
    dtype = accumulation_dtype(x)
    out = x.to(dtype)
    if shift is not None:
        shift = shift.to(dtype).unflatten(-1, x.shape[-2:])
        out = out + per_token(shift, x, segments)
    if weight is not None:
        bias = None if bias is None else bias.to(dtype)
        out = F.layer_norm(out, x.shape[-1:], weight.to(dtype), bias, eps)
    if tables is not None:
        cos, sin = (table.to(dtype).unsqueeze(-2) for table in tables)
        out = out * cos + rotate_pairs(out) * sin
    return out.to(x.dtype)
