"""Each op as plain PyTorch in the tokens' own dtype, the way eager TiM code writes it.

The yardstick of every comparison, and what `torch.compile` gets. Nothing here is slower than it
needs to be: RoPE tables and the owners of packed tokens are made before the clock starts, and what
a fused op adds for the sake of another (a branch's bias) is not asked of eager code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.eager import apply_rope, modulate
from tim_kernels import TimeMLP
from tim_kernels.coefficients import per_sample
from tim_kernels.qk_norm_rope.reference import grid_positions, rope_tables
from tim_kernels.time_pair_embedding.reference import sinusoid


class Tokens:
    """Where tokens sit and which sample owns them: a (h, w) grid of every sample, or `grids`, one
    for each of the sequences packed end to end."""

    def __init__(self, grid: tuple[int, int], grids: tuple | None, head_dim: int, device):
        self.lengths = [h * w for h, w in grids] if grids else None
        self.owner = None  # (T,) int64, of packed tokens
        if device == "meta" or torch.device(device).type == "meta":
            tokens = sum(self.lengths) if grids else grid[0] * grid[1]
            self.cos, self.sin = torch.empty(2, tokens, 1, head_dim, device="meta")
            if grids:
                self.owner = torch.empty(tokens, dtype=torch.long, device="meta")
            return
        positions = [grid_positions(h, w, "upstream", device) for h, w in grids or [grid]]
        tables = rope_tables(torch.cat(positions), head_dim)
        self.cos, self.sin = (table.unsqueeze(1) for table in tables)  # (N, 1, head_dim)
        if grids:
            index = torch.arange(len(grids), device=device)
            self.owner = index.repeat_interleave(torch.tensor(self.lengths, device=device))

    def spread(self, cond: Tensor) -> Tensor:
        """Conditioning (B, …), shaped to broadcast over its sample's tokens."""
        return cond[:, None] if self.owner is None else cond.index_select(0, self.owner)

    def ada_layer_norm(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return modulate(x, self.spread(shift), self.spread(scale))

    def gated_residual(self, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return x + self.spread(gate) * branch

    def gated_residual_ada_layer_norm(self, x, branch, gate, shift, scale):
        x = self.gated_residual(x, branch, gate)
        return x, self.ada_layer_norm(x, shift, scale)

    def norm_rope(self, x, weight=None, bias=None, shift=None) -> Tensor:
        if shift is not None:
            x = x + self.spread(shift.unflatten(-1, x.shape[-2:]))
        if weight is not None:
            x = F.layer_norm(x, x.shape[-1:], weight, bias)
        return apply_rope(x, self.cos, self.sin)

    def qk_norm_rope(self, q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift):
        q = self.norm_rope(q, q_weight, q_bias, q_shift)
        return q, self.norm_rope(k, k_weight, k_bias, k_shift)

    def qkv_norm_rope(self, qkv, *args):
        q, k, v = qkv.unbind(-3)
        return *self.qk_norm_rope(q, k, *args), v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate) * value


def packed_swiglu(x: Tensor) -> Tensor:
    return swiglu(*x.chunk(2, dim=-1))


def time_pair_embedding(t: Tensor, r: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    T, D = TimeMLP(*weights[:4]), TimeMLP(*weights[4:])
    return T(sinusoid(t).to(T.w1.dtype)), D(sinusoid(t - r).to(D.w1.dtype))


def transition_inputs(x, z, alpha, sigma, d_alpha, d_sigma, alpha_pm, sigma_pm):
    def mix(a, b):
        rest = slice(len(x) - len(a), None)
        return per_sample(a, x) * x[rest] + per_sample(b, z) * z[rest]

    sides = zip(alpha_pm.chunk(2), sigma_pm.chunk(2), strict=True)
    return mix(alpha, sigma), mix(d_alpha, d_sigma), torch.cat([mix(*side) for side in sides])


def transition_loss(prediction, x, z, neighbours, epsilon, *coefficients):
    a_x, a_z, a_D = (per_sample(a, x) for a in coefficients[:3])
    later, earlier = neighbours.chunk(2)
    D = (later.float() - earlier) / (2 * epsilon)
    target = a_x * x + a_z * z
    rest = slice(len(x) - len(D), None)
    target[rest] += a_D[rest] * D
    prediction = prediction.float()
    squared = (prediction - target).square().flatten(1).mean(1)
    cosine = 1 - F.cosine_similarity(prediction, target, dim=1)
    return squared, cosine.flatten(1).mean(1)


def transition_step(x, F_cond, F_uncond, guidance, a, b):
    F_cond, F_uncond = F_cond.to(x.dtype), F_uncond.to(x.dtype)
    F_both = F_uncond + per_sample(guidance, x) * (F_cond - F_uncond)
    return per_sample(a, x) * x + per_sample(b, x) * F_both
