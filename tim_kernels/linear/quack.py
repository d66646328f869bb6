"""The same by quack-kernels: its products of Hopper's warp groups, with these functions of their
sums (float32, in registers) in place of a plain store.

Tiles are those that spill nothing and leave every register to two consumers: 128 tokens, and of 168
registers a thread no more. An interleaved weight gives a thread a gate and its value side by side.
"""

import torch
from quack.activation import dswiglu, swiglu
from quack.epilogue import gemm_epilogue, pack, unpack
from quack.epilogue.ops import RowVecLoad, RowVecReduce
from torch import Tensor

TOKENS = 128  # of a tile
OF_SWIGLU = dict(tile_M=TOKENS, tile_N=256, cluster_M=2, cluster_N=1)
OF_RESIDUAL = dict(tile_M=TOKENS, tile_N=192, cluster_M=2, cluster_N=1)
ALIGNMENT = 16  # bytes, at which every tensor has to begin
PLANS = 256  # of calls, one a shape, that an epilogue keeps


@gemm_epilogue(outputs=("out",), ops={"bias": RowVecLoad("bias")}, mode="acc_pair")
def gated(acc, bias):
    gate, value = unpack(acc + bias)
    return {"out": swiglu(gate, value)}


@gemm_epilogue(outputs=("out",), ops={"bias": RowVecLoad("bias")}, mode="acc_pair")
def gated_kept(acc, bias):
    gate, value = unpack(acc + bias)
    return {"D": pack(gate, value), "out": swiglu(gate, value)}


@gemm_epilogue(
    reduces={"dgate": RowVecReduce("dgate"), "dvalue": RowVecReduce("dvalue")},
    mode="packed_cd_b16x2",
)
def gated_backward(acc, c):
    gate, value = unpack(c)
    dgate, dvalue, _ = dswiglu(gate, value, acc)
    return {"D": pack(dgate, dvalue), "dgate": dgate, "dvalue": dvalue}


@gemm_epilogue(ops={"row": RowVecLoad("row"), "gate": RowVecLoad("gate")})
def gated_residual(acc, c, row, gate):
    return {"D": c + gate * (acc + row)}


def _multiply(epilogue, *args, **kwargs) -> None:
    """Packed tokens are of a new number at each call, and the library keeps the plans of all."""
    if len(epilogue._plan_cache) >= PLANS:
        epilogue._plan_cache.clear()
    epilogue.gemm(*args, **kwargs)


def linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """x (T, K), weight (2H, K), bias float32 (2H,): (T, H), and (T, 2H) if it is to be kept."""
    tokens, hidden = x.shape[0], weight.shape[0] // 2
    out = x.new_empty(tokens, hidden)
    both = x.new_empty(tokens, 2 * hidden) if keep else x.new_empty(0)
    _multiply(
        gated_kept if keep else gated, _aligned(x), _aligned(weight), both if keep else None,
        epi_args=dict(bias=bias.unsqueeze(0), out=out), **OF_SWIGLU,
    )  # fmt: skip
    return out, both


def linear_swiglu_backward(dy: Tensor, weight: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    """dy (T, N), weight (N, H), both (T, 2H): (T, 2H) and float32 (2H,)."""
    tokens, hidden = both.shape[0], both.shape[1] // 2
    both = _aligned(both)
    dboth, tiles = torch.empty_like(both), -(-tokens // TOKENS)
    sums = torch.empty(2, tiles, hidden, dtype=torch.float32, device=both.device)
    _multiply(
        gated_backward, _aligned(dy), _aligned(weight), dboth, both,
        epi_args=dict(dgate=sums[0], dvalue=sums[1]), b_kn=True, **OF_SWIGLU,
    )  # fmt: skip
    return dboth, sums.sum(1).t().flatten()


def linear_gated_residual(
    x: Tensor, weight: Tensor, row: Tensor, residual: Tensor, gate: Tensor, cu: Tensor | None, _
) -> Tensor:
    """x (B, N, K) or packed (T, K), residual likewise, rows (S, N) or (1, N)."""
    samples = x.shape[0] if cu is None else cu.shape[0] - 1
    residual = _aligned(residual)
    out = torch.empty_like(residual)
    row, gate, cu = (y if y is None else _begun_well(y) for y in (row, gate, cu))
    rows = dict(row=row.expand(samples, -1), gate=gate.expand(samples, -1))
    _multiply(
        gated_residual, _aligned(x), _aligned(weight).expand(samples, -1, -1), out, residual,
        epi_args=rows, cu_seqlens_m=cu, **OF_RESIDUAL,
    )  # fmt: skip
    return out


def _aligned(x: Tensor) -> Tensor:
    return _begun_well(x.contiguous())


def _begun_well(x: Tensor) -> Tensor:
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()
