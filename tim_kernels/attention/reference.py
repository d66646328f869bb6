import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..dispatch.torch_private import has_tangent, is_mapped
from ..segments import Segments


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments | None = None,
    k_segments: Segments | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """softmax(q·kᵀ/√head_dim)·v by PyTorch's own scaled_dot_product_attention.

    Packed tokens attend through a block-diagonal mask, whose memory grows with T². Under forward
    mode it takes the composite implementation, the one that has a forward derivative; its memory
    grows with N·M.
    """
    is_packed = segments is not None
    mask = None if key_mask is None else key_mask[:, None, None]  # (B, 1, 1, M)
    if is_packed:
        owner, k_owner = (
            torch.searchsorted(s.cu_seqlens, torch.arange(len(x), device=x.device), right=True)
            for s, x in ((segments, q), (k_segments or segments, k))
        )
        mask = owner[:, None] == k_owner  # (T, S)
        q, k, v = q[None], k[None], v[None]
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if mask is None:
        return _attend(*heads_first).transpose(1, 2)
    has_key = mask.any(-1, keepdim=True)  # without one a query attends to all, for a finite
    out = torch.where(has_key, _attend(*heads_first, mask | ~has_key), 0)  # gradient of zero
    return out.transpose(1, 2)[0] if is_packed else out.transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    is_looped = q.device.type == "cpu" and is_mapped((q, k, v))  # PyTorch's kernel there, by vmap
    if is_looped or has_tangent((q, k, v)):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, mask)
