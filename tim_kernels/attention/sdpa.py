"""torch.nn.functional.scaled_dot_product_attention, as it is called, on `attention`."""

import torch
from torch import Tensor

from .op import attention
from .reference import composite

AUTOCAST = {"cpu", "cuda", "mps", "xpu"}  # device types; the question is not traceable before 2.13


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Values and tangents of PyTorch's function of (…, heads, N, head_dim), or (…, N, head_dim).

    `attention` computes it where no mask but a boolean one, the same for all heads and queries of
    a sample, is given, no dropout, and a positive scale; the composite implementation all else, in
    memory that grows with N·M.
    """
    device = query.device.type
    if device in AUTOCAST and torch.is_autocast_enabled(device):
        tensors = [_lower(x) for x in (query, key, value, attn_mask)]
        with torch.autocast(device, enabled=False):
            return scaled_dot_product_attention(*tensors, dropout_p, is_causal, scale, enable_gqa)
    is_plain = not dropout_p and (scale is None or scale > 0)
    ours = _ours(query, key, value, attn_mask, enable_gqa) if is_plain else None
    if ours is None or (is_causal and attn_mask is not None):
        return composite(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v, key_mask = ours
    out = attention(q, k, v, key_mask=key_mask, scale=scale, is_causal=is_causal)
    return out.transpose(1, 2).view(*query.shape[:-1], value.shape[-1])


def _lower(x: Tensor | None) -> Tensor | None:
    """x as autocast hands it to attention."""
    if x is None or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _ours(q, k, v, mask, is_grouped: bool) -> tuple | None:
    """q, k, v (B, N, heads, head_dim) and key_mask (B, M), views where strides allow; None if that
    is not all there is."""
    if not q.ndim == k.ndim == v.ndim > 2:
        return None
    if mask is not None:
        if mask.dtype != torch.bool or not 0 < mask.ndim <= q.ndim:
            return None
        mask = mask[(None,) * (q.ndim - mask.ndim)]
    if q.ndim == 3:  # its first dimension is heads if they are grouped, else samples
        at = 0 if is_grouped else 1
        q, k, v, mask = (None if x is None else x.unsqueeze(at) for x in (q, k, v, mask))
    outer = -3 if is_grouped else -2
    if (q.shape[:outer], q.shape[-1]) != (k.shape[:outer], k.shape[-1]):
        return None  # to broadcast, or wrong
    if k.shape[:-1] != v.shape[:-1]:
        return None
    if mask is not None:
        if mask.shape[-3:-1] != (1, 1):
            return None
        batch, M = q.shape[:-3], k.shape[-2]
        mask = mask.expand(*batch, 1, 1, M).reshape(batch.numel(), M)
    return *(x.flatten(0, -4).transpose(1, 2) for x in (q, k, v)), mask
