"""The modules of TiM: weights under the published names, and forwards that are functions of
`tim_kernels.network`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tim_kernels.network.attentions import (
    Pending,
    Rope,
    TextKeys,
    cross_attention,
    self_attention,
)
from tim_kernels.network.blocks import BlockRows, class_block, final_layer, text_block
from tim_kernels.network.checkpointing import checkpointed
from tim_kernels.network.layers import swiglu_mlp


class SwiGLU(nn.Module):
    """(…, in) → (…, out): fc2(silu(fc1_g(x))·fc1_x(x)) (arXiv 2002.05202)."""

    runs_on_tim_kernels = True

    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        self.fc1_g = nn.Linear(in_features, hidden_features)
        self.fc1_x = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    forward = swiglu_mlp


def _head_norm(head_dim: int, qk_norm: bool) -> nn.Module:
    return nn.LayerNorm(head_dim, eps=1e-5) if qk_norm else nn.Identity()


class Attention(nn.Module):
    """Self-attention with QK-norm and axial RoPE; `distance_aware` adds qkv_d(delta) to qkv."""

    runs_on_tim_kernels = True

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, distance_aware: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.qkv_d = nn.Linear(dim, 3 * dim, bias=False) if distance_aware else None
        self.q_norm = _head_norm(dim // num_heads, qk_norm)
        self.k_norm = _head_norm(dim // num_heads, qk_norm)
        self.proj = nn.Linear(dim, dim)

    forward = self_attention


class CrossAttention(nn.Module):
    """Image tokens attend to all text tokens; RoPE on the queries only."""

    runs_on_tim_kernels = True

    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.q_norm = _head_norm(dim // num_heads, qk_norm)
        self.k_norm = _head_norm(dim // num_heads, qk_norm)
        self.proj = nn.Linear(dim, dim)

    forward = cross_attention


def _layer_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class BlockShape(NamedTuple):
    dim: int
    num_heads: int
    mlp_hidden: int
    lora_hidden: int
    qk_norm: bool
    distance_aware: bool


class Block(nn.Module):
    """What both kinds of block share: `function` computes them."""

    runs_on_tim_kernels = True
    gradient_checkpointing = False  # `enable_gradient_checkpointing` of the model sets it
    function: Callable

    def forward(
        self,
        hidden_states: Tensor,  # by this name diffusers' caches find it
        pending: Pending | None,
        c: Tensor | None,
        delta: Tensor | None,
        text: Tensor | TextKeys | None,
        rope: Rope,
        rows: BlockRows | None = None,
    ) -> tuple[Tensor, Pending] | Tensor:
        """See `class_block` and `text_block` of `tim_kernels.network.blocks`."""
        args = self, hidden_states, pending, c, delta, text, rope, rows
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpointed(self._gradient_checkpointing_func, type(self).function, *args)
        return type(self).function(*args)


class ClassBlock(Block):
    """Self-attention and MLP, modulated by six rows of the conditioning."""

    function = staticmethod(class_block)

    def __init__(self, shape: BlockShape):
        super().__init__()
        dim, num_heads, mlp_hidden, lora_hidden, qk_norm, distance_aware = shape
        self.norm1 = _layer_norm(dim)
        self.attn = Attention(dim, num_heads, qk_norm, distance_aware)
        self.norm2 = _layer_norm(dim)
        self.mlp = SwiGLU(dim, mlp_hidden, dim)
        self.adaLN_modulation = SwiGLU(dim, lora_hidden, 6 * dim)


class TextBlock(Block):
    """Self-attention, cross-attention to the text and MLP, modulated by nine rows."""

    function = staticmethod(text_block)

    def __init__(self, shape: BlockShape):
        super().__init__()
        dim, num_heads, mlp_hidden, lora_hidden, qk_norm, distance_aware = shape
        self.norm1 = _layer_norm(dim)
        self.attn = Attention(dim, num_heads, qk_norm, distance_aware)
        self.norm2_i = _layer_norm(dim)
        self.norm2_t = _layer_norm(dim)
        self.cross_attn = CrossAttention(dim, num_heads, qk_norm)
        self.norm3 = _layer_norm(dim)
        self.mlp = SwiGLU(dim, mlp_hidden, dim)
        self.adaLN_modulation = SwiGLU(dim, lora_hidden, 9 * dim)


class FinalLayer(nn.Module):
    runs_on_tim_kernels = True

    def __init__(self, dim: int, out_features: int):
        super().__init__()
        self.norm_final = _layer_norm(dim)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = SwiGLU(dim, dim // 2, 2 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, N, C), modulated by c (B, C) or (B, 1, C), → (B, N, out_features)."""
        return final_layer(self, x, c)


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
