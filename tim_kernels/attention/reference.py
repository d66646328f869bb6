import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√head_dim)·v, without mask or dropout.

    q is (B, N, heads, head_dim), k and v are (B, M, heads, head_dim); returns q's shape.
    Under forward-mode differentiation it takes PyTorch's composite implementation, the one
    that has a forward derivative; its memory grows with N·M.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if any(forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)):
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)
