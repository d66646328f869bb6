import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.torch_private import has_tangent, is_mapped, math_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """softmax(scale·q·kᵀ)·v by PyTorch's own scaled_dot_product_attention.

    Under forward mode it takes the composite implementation, the one that has a forward derivative;
    its memory grows with N·M.
    """
    options = dict(scale=scale)
    if q.shape[-2] != k.shape[-2]:
        options["enable_gqa"] = True
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if key_mask is None:
        return _attend(*heads_first, is_causal=is_causal, **options).transpose(1, 2)
    mask = key_mask[:, None, None]  # (B, 1, 1, M)
    if is_causal:
        place, k_place = (torch.arange(x.shape[1], device=x.device) for x in (q, k))
        mask = mask & (place[:, None] >= k_place)
    has_key = mask.any(-1, keepdim=True)  # without one a query attends to all, for a finite
    out = torch.where(has_key, _attend(*heads_first, mask | ~has_key, **options), 0)  # gradient
    return out.transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    is_looped = q.device.type == "cpu" and is_mapped((q, k, v))  # PyTorch's kernel there, by vmap
    is_composite = is_looped or has_tangent((q, k, v))
    attend = composite if is_composite else F.scaled_dot_product_attention
    return attend(q, k, v, mask, **options)


def composite(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention from its parts, which all have forward derivatives; what
    sdpa_kernel(SDPBackend.MATH) chooses, without its settings, which are of all threads."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    return math_attention(
        q, k, v, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
