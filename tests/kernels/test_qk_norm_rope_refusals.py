import pytest
import torch
from parity import DEVICE
from qk_norm_rope_forms import inputs

from tim_kernels import Segments
from tim_kernels.qk_norm_rope.op import qk_norm_rope, qkv_norm_rope


def refused(message, *args, **options):
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(*args, **options)


def test_refusals():
    q, k, *rows = inputs("both")
    weight, bias = rows[:2]
    at = torch.zeros(6, 2, dtype=torch.int64, device=DEVICE)
    refused(r"k must be shaped as q", q, k[:, 1:])
    refused(r"q must be \(B, N, heads, head_dim\)", q[0])
    refused(r"q must be \(B, N, heads, head_dim\)", q[..., None])
    refused("floating-point", q.long())
    refused(r"q_weight must be \(24,\)", q, None, weight[1:])
    refused("q_bias is given, but no q_weight", q, None, None, bias)
    refused("k_weight is given, but no k", q, None, None, None, weight)
    refused("k_shift is given, but no k", q, k_shift=rows[4])
    refused(r"q_shift must be \(2, 48\) or \(1, 48\)", q, q_shift=rows[4][:, 1:])
    refused(
        "one of positions, grid and sizes, got positions and grid", q, positions=at, grid=(2, 3)
    )
    refused(r"grid must be .* 6; got \(2, 4\)", q, grid=(2, 4))
    refused("order must be one of", q, grid=(2, 3), order="rows")
    refused("multiple of 4", q[..., :6], grid=(2, 3))
    refused(r"positions must be .*int64, \(2, 6, 2\) or \(6, 2\)", q, positions=at[1:])
    refused("positions must be", q, positions=at.float())
    refused("sizes must be torch.int32", q, sizes=at[:2])
    with pytest.raises(ValueError, match=r"qkv must be \(B, N, 3, heads, head_dim\)"):
        qkv_norm_rope(torch.stack((q, k), dim=2))
    segments = Segments(torch.tensor([0, 6], dtype=torch.int32, device=DEVICE), 6)
    refused(r"q must be \(T, heads, head_dim\)", q, segments=segments)
