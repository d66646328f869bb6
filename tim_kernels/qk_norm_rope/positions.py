"""Where tokens sit: what the public functions take, checked, and as kernels take it.

A token's two positions are given, or follow from its index n in its sample as
(n mod period, n div period). A grid (h, w) has one period for all samples, `sizes` has one for
each: w in the order "grid", h in the order "upstream".
"""

import torch
from torch import Tensor

from ..names import ORDERS


def is_rotated(positions: Tensor | None, grid, sizes: Tensor | None) -> bool:
    return positions is not None or grid is not None or sizes is not None


def period_of(grid: tuple[int, int] | None, order: str) -> int:
    """0 without a grid."""
    return 0 if grid is None else grid[_side(order)]


def periods_of(sizes: Tensor | None, order: str) -> Tensor | None:
    """(S,), a view of sizes (S, 2)."""
    return None if sizes is None else sizes.select(1, _side(order))


def _side(order: str) -> int:
    return 1 if order == "grid" else 0


def check_positions(q, samples: int, positions, grid, sizes, order, is_packed: bool) -> None:
    """Refuse more than one source of positions, and one that does not fit tokens q."""
    given = [
        name
        for name, source in (("positions", positions), ("grid", grid), ("sizes", sizes))
        if source is not None
    ]
    if not given:
        return
    if len(given) > 1:
        raise ValueError(f"give one of positions, grid and sizes, got {' and '.join(given)}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    if q.shape[-1] % 4:
        raise ValueError(f"head_dim must be a multiple of 4 for 2-D RoPE, got {q.shape[-1]}")
    if positions is not None:
        shapes = [(q.shape[0], 2)] if is_packed else [(*q.shape[:2], 2), (q.shape[1], 2)]
        _check_integers("positions", positions, shapes, (torch.int32, torch.int64), q)
    elif sizes is not None:
        _check_integers("sizes", sizes, [(samples, 2)], (torch.int32,), q)
    elif len(grid) != 2 or (not is_packed and grid[0] * grid[1] != q.shape[1]):
        raise ValueError(
            f"grid must be (h, w) with h·w the number of tokens, {q.shape[1]}; got {tuple(grid)}"
        )


def _check_integers(name, tensor, shapes, dtypes, q) -> None:
    if tensor.shape not in shapes or tensor.dtype not in dtypes or tensor.device != q.device:
        needed = " or ".join(map(str, shapes))
        kinds = " or ".join(map(str, dtypes))
        raise ValueError(
            f"{name} must be {kinds}, {needed}, on {q.device}; "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
