import math

import torch
from torch import Tensor

from ..dtypes import accumulation_dtype

CONDITIONS = ("t-r", "r", "t,r", "t,t-r", "r,t-r", "t,r,t-r")


def sinusoid(t: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """[cos(t·f), sin(t·f)] with f_i = max_period^(−i/(dim/2)); (B,) → (B, dim), float32."""
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    freqs = torch.exp(-math.log(max_period) * index / half)
    angles = t.to(accumulation_dtype(t)).unsqueeze(-1) * freqs
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
