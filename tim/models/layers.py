import torch
from torch import Tensor, nn

from tim_kernels import ada_layer_norm, attention, gated_residual, norm_rope, swiglu

RopeTables = tuple[Tensor, Tensor]  # cos and sin, each float32 (N, head_dim)


class SwiGLU(nn.Module):
    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        self.fc1_g = nn.Linear(in_features, hidden_features)
        self.fc1_x = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(swiglu(self.fc1_g(x), self.fc1_x(x)))


class QKNormMixin:
    """q_norm and k_norm: LayerNorm over head_dim, or nothing."""

    def add_qk_norm(self, head_dim: int, qk_norm: bool) -> None:
        self.q_norm = nn.LayerNorm(head_dim, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-5) if qk_norm else nn.Identity()


def _norm_rope(x: Tensor, norm: nn.Module, tables: RopeTables | None) -> Tensor:
    return norm_rope(x, getattr(norm, "weight", None), getattr(norm, "bias", None), tables)


class Attention(nn.Module, QKNormMixin):
    """Self-attention with QK-norm and axial RoPE; `distance_aware` adds qkv_d(delta)."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, distance_aware: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.qkv_d = nn.Linear(dim, 3 * dim, bias=False) if distance_aware else None
        self.add_qk_norm(dim // num_heads, qk_norm)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, delta: Tensor, tables: RopeTables) -> Tensor:
        qkv = self.qkv(x)  # (B, N, 3C)
        if self.qkv_d is not None:
            qkv = qkv + self.qkv_d(delta).unsqueeze(1)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, N, heads, head_dim)
        q, k = _norm_rope(q, self.q_norm, tables), _norm_rope(k, self.k_norm, tables)
        return self.proj(attention(q, k, v).flatten(2))


class CrossAttention(nn.Module, QKNormMixin):
    """Image tokens attend to all text tokens; RoPE on the queries only."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.add_qk_norm(dim // num_heads, qk_norm)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor, tables: RopeTables) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        k, v = self.kv(text).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        q, k = _norm_rope(q, self.q_norm, tables), _norm_rope(k, self.k_norm, None)
        return self.proj(attention(q, k, v).flatten(2))


def _layer_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class ClassBlock(nn.Module):
    """Self-attention and MLP, each modulated by six rows of the conditioning vector."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_hidden: int,
        lora_hidden: int,
        qk_norm: bool,
        distance_aware: bool,
    ):
        super().__init__()
        self.norm1 = _layer_norm(dim)
        self.attn = Attention(dim, num_heads, qk_norm, distance_aware)
        self.norm2 = _layer_norm(dim)
        self.mlp = SwiGLU(dim, mlp_hidden, dim)
        self.adaLN_modulation = SwiGLU(dim, lora_hidden, 6 * dim)

    def forward(
        self, x: Tensor, c: Tensor, delta: Tensor, text: None, tables: RopeTables
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        y = ada_layer_norm(x, shift1, scale1, self.norm1.eps)
        x = gated_residual(x, self.attn(y, delta, tables), gate1)
        y = ada_layer_norm(x, shift2, scale2, self.norm2.eps)
        return gated_residual(x, self.mlp(y), gate2)


class TextBlock(nn.Module):
    """Self-attention, cross-attention to the text and MLP, modulated by nine rows."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_hidden: int,
        lora_hidden: int,
        qk_norm: bool,
        distance_aware: bool,
    ):
        super().__init__()
        self.norm1 = _layer_norm(dim)
        self.attn = Attention(dim, num_heads, qk_norm, distance_aware)
        self.norm2_i = _layer_norm(dim)
        self.norm2_t = _layer_norm(dim)
        self.cross_attn = CrossAttention(dim, num_heads, qk_norm)
        self.norm3 = _layer_norm(dim)
        self.mlp = SwiGLU(dim, mlp_hidden, dim)
        self.adaLN_modulation = SwiGLU(dim, lora_hidden, 9 * dim)

    def forward(
        self, x: Tensor, c: Tensor, delta: Tensor, text: Tensor, tables: RopeTables
    ) -> Tensor:
        rows = self.adaLN_modulation(c).chunk(9, dim=-1)
        y = ada_layer_norm(x, rows[0], rows[1], self.norm1.eps)
        x = gated_residual(x, self.attn(y, delta, tables), rows[2])
        y = ada_layer_norm(x, rows[3], rows[4], self.norm2_i.eps)
        x = gated_residual(x, self.cross_attn(y, self.norm2_t(text), tables), rows[5])
        y = ada_layer_norm(x, rows[6], rows[7], self.norm3.eps)
        return gated_residual(x, self.mlp(y), rows[8])


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out_features: int):
        super().__init__()
        self.norm_final = _layer_norm(dim)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = SwiGLU(dim, dim // 2, 2 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(ada_layer_norm(x, shift, scale, self.norm_final.eps))


def projector(dim: int, projector_dim: int, z_dim: int) -> nn.Sequential:
    """The head whose output the REPA loss aligns with a vision encoder (arXiv 2410.06940)."""
    return nn.Sequential(
        nn.Linear(dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, z_dim),
    )


@torch.no_grad()
def zero_(linear: nn.Linear) -> None:
    linear.weight.zero_()
    linear.bias.zero_()
