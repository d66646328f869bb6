import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulation_dtype


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x)·(1 + scale) + shift, the adaptive LayerNorm of DiT (arXiv 2212.09748, section 3.2).

    x is (B, N, C); shift and scale are (B, C) or (1, C). Returns (B, N, C) in x's dtype.
    """
    dtype = accumulation_dtype(x, shift, scale)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return torch.addcmul(shift.to(dtype).unsqueeze(1), normed, 1 + scale.to(dtype).unsqueeze(1)).to(
        x.dtype
    )


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, branch_bias: Tensor | None = None
) -> Tensor:
    """x + gate·(branch + branch_bias).

    x and branch are (B, N, C); gate and branch_bias are (B, C) or (1, C). Returns x's dtype.
    """
    dtype = accumulation_dtype(x, branch, gate)
    branch = branch.to(dtype)
    if branch_bias is not None:
        branch = branch + branch_bias.to(dtype).unsqueeze(1)
    return torch.addcmul(x.to(dtype), gate.to(dtype).unsqueeze(1), branch).to(x.dtype)
