import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..segments import Segments


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments | None = None,
    k_segments: Segments | None = None,
) -> Tensor:
    """softmax(q·kᵀ/√head_dim)·v by PyTorch's own scaled_dot_product_attention.

    Packed tokens attend through a block-diagonal mask, whose memory grows with T². Under forward
    mode it takes the composite implementation, the one that has a forward derivative; its memory
    grows with N·M.
    """
    mask = None
    if segments is not None:
        owner, k_owner = (
            torch.searchsorted(s.cu_seqlens, torch.arange(len(x), device=x.device), right=True)
            for s, x in ((segments, q), (k_segments or segments, k))
        )
        mask = owner[:, None] == k_owner[None, :]  # (T, S)
        q, k, v = q[None], k[None], v[None]
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if any(forward_ad.unpack_dual(x).tangent is not None for x in heads_first):
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask)
    else:
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask)
    out = out.transpose(1, 2)
    return out if segments is None else out[0]
