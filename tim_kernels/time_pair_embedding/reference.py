import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulation_dtype

DIM = 256  # of a sinusoid


class TimeMLP(NamedTuple):
    """Two layers over a sinusoid, w2·silu(w1·x + b1) + b2; w1 (H, 256), w2 (C, H)."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.w1, self.b1)), self.w2, self.b2)


def frequencies(dim: int = DIM, max_period: float = 10000.0, device=None) -> Tensor:
    """f_i = max_period^(−i/(dim/2)), float32 (dim/2,)."""
    index = torch.arange(dim // 2, dtype=torch.float32, device=device)
    return torch.exp(-math.log(max_period) * index / (dim // 2))


def sinusoid(t: Tensor, dim: int = DIM, max_period: float = 10000.0) -> Tensor:
    """[cos(t·f), sin(t·f)] of `frequencies`; (B,) → (B, dim), float32."""
    angles = t.to(accumulation_dtype(t)).unsqueeze(-1) * frequencies(dim, max_period, t.device)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def sinusoids(t: Tensor, r: Tensor, times: str, dtype: torch.dtype) -> Tensor:
    """Of each of `times`, a list like "t,r,t-r": (slots, B, 256) in `dtype`."""
    wide = accumulation_dtype(t, r)
    t, r = t.to(wide), r.to(wide)
    known = {"t": t, "r": r, "t-r": t - r}
    return torch.stack([sinusoid(known[time]).to(dtype) for time in times.split(",")])


def time_pair_embedding(
    t: Tensor, r: Tensor, t_mlp: TimeMLP, delta_mlp: TimeMLP | None, condition: str
) -> tuple[Tensor, Tensor]:
    """T(t) and the delta embedding of the pair (t, r), each (B, C).

    `condition` lists what the delta embedding sums: its last term goes through the delta
    embedder D, the others through T. "t,t-r" is T(t) + D(t−r).
    """
    dtype = accumulation_dtype(t, r)
    times = {"t": t.to(dtype), "r": r.to(dtype), "t-r": t.to(dtype) - r.to(dtype)}

    def embed(time: str, mlp: TimeMLP) -> Tensor:
        return mlp(sinusoid(times[time]).to(mlp.w1.dtype))

    t_embedding = embed("t", t_mlp)
    *summands, last = condition.split(",")
    delta = embed(last, delta_mlp or t_mlp)
    total = delta.to(accumulation_dtype(delta))
    for time in summands:
        total = total + (t_embedding if time == "t" else embed(time, t_mlp))
    return t_embedding, total.to(delta.dtype)
