"""What the public functions take, checked, and brought to what the operators take."""

import torch
from torch import Tensor

from ..segments import check_row, check_same_device, check_tokens
from .reference import ORDERS


def arguments(
    q, k, affine: dict, shifts: dict, positions, grid, sizes, order, eps, segments
) -> tuple:
    """Checked, as the operator takes them after q and k."""
    samples = _check(q, k, affine, shifts, segments)
    _check_positions(q, samples, positions, grid, sizes, order, segments)
    divisor, divisors = 0, None  # of the token's index, by which it falls into its two positions
    if grid is not None:
        divisor = grid[1] if order == "grid" else grid[0]
    if sizes is not None:
        divisors = sizes[:, 1 if order == "grid" else 0]
    packing = (None, 0) if segments is None else (segments.cu_seqlens, segments.max_length)
    return *affine.values(), *shifts.values(), positions, divisor, divisors, float(eps), *packing


def _check(q: Tensor, k: Tensor | None, affine: dict, shifts: dict, segments) -> int:
    samples = check_tokens("q", q, segments)
    check_same_device("q", q, q)
    layout = "(B, N, heads, head_dim)" if segments is None else "(T, heads, head_dim)"
    if q.ndim != layout.count(",") + 1:
        raise ValueError(f"q must be {layout}, got {tuple(q.shape)}")
    if k is not None:
        check_same_device("k", k, q)
        if k.shape != q.shape:
            raise ValueError(f"k must be shaped as q, {tuple(q.shape)}; got {tuple(k.shape)}")
    H, D = q.shape[-2:]
    for name, row in (affine | shifts).items():
        if row is None:
            continue
        if name[0] == "k" and k is None:
            raise ValueError(f"{name} is given, but no k")
        if name in shifts:
            check_row(name, row, samples, H * D, q)
            continue
        check_same_device(name, row, q)
        if row.shape != (D,):
            raise ValueError(f"{name} must be ({D},), got {tuple(row.shape)}")
        if affine[f"{name[0]}_weight"] is None:
            raise ValueError(f"{name} is given, but no {name[0]}_weight: the norm needs a weight")
    return samples


def _check_positions(q, samples, positions, grid, sizes, order, segments) -> None:
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
        shapes = [(*q.shape[:2], 2), (q.shape[1], 2)] if segments is None else [(q.shape[0], 2)]
        _check_integers("positions", positions, shapes, (torch.int32, torch.int64), q)
    elif sizes is not None:
        _check_integers("sizes", sizes, [(samples, 2)], (torch.int32,), q)
    elif len(grid) != 2 or (segments is None and grid[0] * grid[1] != q.shape[1]):
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
