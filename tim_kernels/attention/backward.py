"""Gradients of attention from its output and log-sum-exp, by PyTorch's kernels."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda

aten = torch.ops.aten
Way = Literal["flash", "efficient", "cpu"]
FROM_TOP_LEFT = 1  # a causal mask, of efficient attention
LSE_STEP = 32  # rows of the log-sum-exp that efficient attention reads, past the last ∞


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """(B, heads, N) of q (B, N, heads, head_dim); packed (heads, T)."""
    return *q.shape[:-3], q.shape[-2], q.shape[-3]


def way(q: Tensor, k: Tensor, v: Tensor, is_packed: bool, is_causal: bool, is_flash: bool):
    """What takes the log-sum-exp of such tensors, a `Way`: flash attention where `is_flash` says
    that it counts keys and queries as we do; None if nothing does, or it is switched off."""
    if not q.numel() or not k.numel():
        return None
    is_grouped = q.shape[-2] != k.shape[-2]
    device = _device(q)
    if device == "cpu":
        return None if is_packed or is_grouped else "cpu"
    if device != "cuda" or torch.version.hip is not None:
        return None
    heads_first = [(x[None] if is_packed else x).transpose(1, 2) for x in (q, k, v)]
    params = cuda.SDPAParams(*heads_first, None, 0.0, is_causal, is_grouped)
    if is_flash and cuda.can_use_flash_attention(params):
        return "flash"
    if is_packed or is_grouped or q.dtype != torch.float32:
        return None
    return "efficient" if cuda.can_use_efficient_attention(params) else None


def _device(x: Tensor) -> str:
    return x.device.type


def gradients(
    way: Way, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu: Tensor | None, k_cu: Tensor | None, max_length: int, k_max_length: int,
    scale: float | None, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of q, k and v; as deterministic as PyTorch is told to be."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if way == "cpu":
        heads_first = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads_first, lse, 0.0, is_causal, scale=scale
        )
        return tuple(x.transpose(1, 2) for x in found)
    nothing = q.new_empty(0)  # the random numbers of no dropout
    if way == "efficient":
        lse = F.pad(lse, (0, -lse.shape[-1] % LSE_STEP), value=float("inf"))
        mask = FROM_TOP_LEFT if is_causal else 0
        return aten._efficient_attention_backward(
            dout, q, k, v, None, out, None, None, q.shape[1], k.shape[1], lse, 0.0,
            nothing, nothing, mask, False, scale=scale,
        )[:3]  # fmt: skip
    if cu is None:
        max_length, k_max_length = q.shape[1], k.shape[1]
    elif k_cu is None:
        k_cu, k_max_length = cu, max_length
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # as varlen_attn gives it
    return aten._flash_attention_backward(
        dout, q, k, v, out, lse, cu, k_cu, max_length, k_max_length, 0.0, is_causal,
        state, nothing, scale=scale,
    )  # fmt: skip
