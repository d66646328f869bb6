"""TiM as plain eager PyTorch, written from the spec alone and not from `tim`.

An independent oracle for configurations without a golden file, a stand-in for somebody else's
model of the published module tree, and the eager contender of the benchmarks.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def rotate_half(x):
    x1, x2 = x[..., 0::2], x[..., 1::2]
    return torch.stack((-x2, x1), dim=-1).reshape(x.shape)


def apply_rope(x, cos, sin):
    return (x * cos + rotate_half(x) * sin).to(x.dtype)


def rope_freqs(h, w, head_dim, device):
    """The published position order: token n sits at (n mod h, n div h)."""
    dim = head_dim // 2
    freqs = 10000.0 ** (-torch.arange(0, dim, 2, device=device).float() / dim)
    n = torch.arange(h * w, device=device).float()
    first, second = n % h, torch.div(n, h, rounding_mode="floor")
    angles = torch.cat((torch.outer(first, freqs), torch.outer(second, freqs)), dim=1)
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden, out):
        super().__init__()
        self.fc1_g, self.fc1_x = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1_g(x)) * self.fc1_x(x))


class Embedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device).float() / 128)
        args = t[:, None].to(freqs.dtype if t.dtype != torch.float64 else t.dtype) * freqs
        return self.mlp(torch.cat((args.cos(), args.sin()), -1).to(self.mlp[0].weight.dtype))


class PatchEmbed(nn.Module):
    def __init__(self, patch, channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class LabelEmbedder(nn.Module):
    def __init__(self, rows, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, dim)

    def forward(self, y):
        return self.embedding_table(y)


class TextEmbedder(nn.Module):
    def __init__(self, cap_feat_dim, dim):
        super().__init__()
        self.norm = nn.LayerNorm(cap_feat_dim)
        self.mlp = SwiGLU(cap_feat_dim, 4 * dim, dim)

    def forward(self, y):
        return self.mlp(self.norm(y))


def attend(q, k, v, materialise):
    """(B, heads, N, head_dim); the published code materialises N×N under forward mode."""
    if materialise:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qk_norm, distance_aware):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        if distance_aware:
            self.qkv_d = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.distance_aware = distance_aware

    def forward(self, x, cos, sin, delta, jvp):
        B, N, C = x.shape
        qkv = self.qkv(x)
        if self.distance_aware:
            qkv = qkv + self.qkv_d(delta)
        q, k, v = qkv.reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q = apply_rope(self.q_norm(q), cos, sin)
        k = apply_rope(self.k_norm(k), cos, sin)
        return self.proj(attend(q, k, v, jvp).transpose(1, 2).reshape(B, N, C))


class CrossAttention(nn.Module):
    def __init__(self, dim, num_heads, qk_norm):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, text, cos, sin, jvp):
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        kv = self.kv(text).reshape(B, -1, 2, self.num_heads, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4)
        q, k = apply_rope(self.q_norm(q), cos, sin), self.k_norm(k)
        return self.proj(attend(q, k, v, jvp).transpose(1, 2).reshape(B, N, C))


def norm(dim):
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class ClassBlock(nn.Module):
    def __init__(self, dim, num_heads, lora, qk_norm, distance_aware, mlp_ratio):
        super().__init__()
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attn = Attention(dim, num_heads, qk_norm, distance_aware)
        self.mlp = SwiGLU(dim, int(dim * mlp_ratio) * 2 // 3, dim)
        self.adaLN_modulation = SwiGLU(dim, lora, 6 * dim)

    def forward(self, x, c, cos, sin, delta, text, jvp):
        a, b, g, d, e, h = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + g * self.attn(modulate(self.norm1(x), a, b), cos, sin, delta, jvp)
        return x + h * self.mlp(modulate(self.norm2(x), d, e))


class TextBlock(nn.Module):
    def __init__(self, dim, num_heads, lora, qk_norm, distance_aware, mlp_ratio):
        super().__init__()
        self.norm1, self.norm2_i, self.norm2_t, self.norm3 = (norm(dim) for _ in range(4))
        self.attn = Attention(dim, num_heads, qk_norm, distance_aware)
        self.cross_attn = CrossAttention(dim, num_heads, qk_norm)
        self.mlp = SwiGLU(dim, int(dim * mlp_ratio) * 2 // 3, dim)
        self.adaLN_modulation = SwiGLU(dim, lora, 9 * dim)

    def forward(self, x, c, cos, sin, delta, text, jvp):
        m = self.adaLN_modulation(c).chunk(9, dim=-1)
        x = x + m[2] * self.attn(modulate(self.norm1(x), m[0], m[1]), cos, sin, delta, jvp)
        y = modulate(self.norm2_i(x), m[3], m[4])
        x = x + m[5] * self.cross_attn(y, self.norm2_t(text), cos, sin, jvp)
        return x + m[8] * self.mlp(modulate(self.norm3(x), m[6], m[7]))


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm_final, self.linear = norm(dim), nn.Linear(dim, out)
        self.adaLN_modulation = SwiGLU(dim, dim // 2, 2 * dim)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class EagerTiM(nn.Module):
    """The published module tree; arguments as in the spec, section 2."""

    def __init__(
        self, *, patch_size, in_channels, hidden_size, encoder_depth, depth, num_heads,
        mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, cap_feat_dim=None, z_dim=768,
        projector_dim=2048, new_condition="t-r", use_new_embed=True, qk_norm=True,
        distance_aware=True, lora_hidden_size=None, input_size=None,
    ):  # fmt: skip
        super().__init__()
        C = hidden_size
        self.patch_size, self.head_dim, self.out_channels = patch_size, C // num_heads, in_channels
        self.encoder_depth, self.new_condition = encoder_depth, new_condition
        self.x_embedder = PatchEmbed(patch_size, in_channels, C)
        self.t_embedder = Embedder(C)
        if use_new_embed:
            self.delta_embedder = Embedder(C)
        self.is_text = cap_feat_dim is not None
        rows = num_classes + (class_dropout_prob > 0)
        self.y_embedder = TextEmbedder(cap_feat_dim, C) if self.is_text else LabelEmbedder(rows, C)
        lora = lora_hidden_size or (C // 4) * 3
        block = TextBlock if self.is_text else ClassBlock
        self.blocks = nn.ModuleList(
            block(C, num_heads, lora, qk_norm, distance_aware, mlp_ratio) for _ in range(depth)
        )
        self.projector = nn.Sequential(
            nn.Linear(C, projector_dim), nn.SiLU(), nn.Linear(projector_dim, projector_dim),
            nn.SiLU(), nn.Linear(projector_dim, z_dim),
        )  # fmt: skip
        self.final_layer = FinalLayer(C, patch_size**2 * in_channels)

    def embed_times(self, t, r):
        T, D = self.t_embedder, getattr(self, "delta_embedder", self.t_embedder)
        match self.new_condition:
            case "t-r":
                return D(t - r)
            case "r":
                return D(r)
            case "t,r":
                return T(t) + D(r)
            case "t,t-r":
                return T(t) + D(t - r)
            case "r,t-r":
                return T(r) + D(t - r)
            case "t,r,t-r":
                return T(t) + T(r) + D(t - r)
        raise AssertionError(self.new_condition)

    def forward(self, x, t, r, y, attn_type="fused_attn", return_zs=False, jvp=False):
        (B, _, H, W), p = x.shape, self.patch_size
        h, w = H // p, W // p
        cos, sin = rope_freqs(h, w, self.head_dim, x.device)
        delta = self.embed_times(t, r)[:, None]
        c = self.t_embedder(t)[:, None] + delta
        y, text = self.y_embedder(y), None
        if self.is_text:
            text = y
        else:
            c = c + y[:, None]
        x, zs = self.x_embedder(x), None
        for i, block in enumerate(self.blocks):
            x = block(x, c, cos, sin, delta, text, jvp or attn_type == "vanilla_attn")
            if i + 1 == self.encoder_depth:
                zs = self.projector(x)
        x = self.final_layer(x, c).reshape(B, h, w, p, p, self.out_channels)
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(B, self.out_channels, H, W)
        return (x, zs) if return_zs else x


def randomise(model, seed=0):
    """Replace every parameter by noise of a trained net's size: zero layers would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
            noise = torch.randn(parameter.shape, generator=generator) * std
            is_norm_weight = "norm" in name and name.endswith("weight")
            parameter.copy_(noise + 1 if is_norm_weight else noise)
    return model
