"""The modulation of diffusers' own layers, by our functions from the same weights."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    LuminaRMSNormZero,
    RMSNorm,
)
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from tim_kernels import (
    ada_layer_norm,
    gated_residual,
    gated_residual_ada_layer_norm,
    use_backend,
)

B, N, C = 2, 6, 32


def affine(norm):
    return dict(eps=norm.eps, weight=norm.weight, bias=getattr(norm, "bias", None))


def zero(layer, x, emb):
    rows = layer.linear(layer.silu(emb)).chunk(6, dim=1)
    return ada_layer_norm(x, *rows[:2], **affine(layer.norm)), *rows[2:]


def continuous(layer, x, emb, norm="layer"):
    scale, shift = layer.linear(layer.silu(emb)).chunk(2, dim=1)
    return ada_layer_norm(x, shift, scale, **affine(layer.norm), norm=norm)


def continuous_rms(layer, x, emb):
    return continuous(layer, x, emb, "rms")


def rms(layer, x):
    return ada_layer_norm(x, **affine(layer), norm="rms")


def lumina(layer, x, emb):
    scale, *rest = layer.linear(layer.silu(emb)).chunk(4, dim=1)
    return ada_layer_norm(x, None, scale, **affine(layer.norm), norm="rms"), *rest


def wan(block, x, text, temb):
    """temb is (B, 6, C), or (B, N, 6, C) where the time is each token's own."""
    modulation = block.scale_shift_table + temb
    if temb.ndim == 4:
        shift, scale, gate, c_shift, c_scale, c_gate = modulation.unbind(2)
    else:
        shift, scale, gate, c_shift, c_scale, c_gate = modulation.chunk(6, dim=1)
    h = ada_layer_norm(x, shift, scale, block.norm1.eps)
    branch = block.attn1(h, None, None, None)
    x, h = gated_residual_ada_layer_norm(x, branch, gate, **affine(block.norm2))
    branch = block.attn2(h, text, None, None)
    x, h = gated_residual_ada_layer_norm(x, branch, None, c_shift, c_scale, block.norm3.eps)
    return gated_residual(x, block.ffn(h), c_gate)


def pixart(block, x, text, time):
    shift, scale, gate, c_shift, c_scale, c_gate = (
        block.scale_shift_table + time.unflatten(-1, (6, C))
    ).chunk(6, dim=1)
    h = ada_layer_norm(x, shift, scale, block.norm1.eps)
    x = gated_residual(x, block.attn1(h), gate)
    branch = block.attn2(x, text)
    x, h = gated_residual_ada_layer_norm(x, branch, None, c_shift, c_scale, block.norm2.eps)
    return gated_residual(x, block.ff(h), c_gate)


def pixart_block():
    return BasicTransformerBlock(
        C, 2, C // 2, cross_attention_dim=C, num_embeds_ada_norm=1000, attention_bias=True,
        activation_fn="gelu-approximate", norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip


def wan_block():
    return WanTransformerBlock(C, 2 * C, 2, cross_attn_norm=True)


TEXT = 3, C
LAYERS = {  # the layer, how it is called, the same by us, the inputs' shapes after the batch
    "AdaLayerNormZero": (lambda: AdaLayerNormZero(C), ("x", "emb"), zero, (C,)),
    "AdaLayerNormContinuous": (
        lambda: AdaLayerNormContinuous(C, C), ("x", "conditioning_embedding"), continuous, (C,)
    ),
    "AdaLayerNormContinuous, rms_norm": (
        lambda: AdaLayerNormContinuous(C, C, norm_type="rms_norm"),
        ("x", "conditioning_embedding"), continuous_rms, (C,),
    ),
    "RMSNorm": (lambda: RMSNorm(C, 1e-6, bias=True), ("hidden_states",), rms),
    "LuminaRMSNormZero": (lambda: LuminaRMSNormZero(C, 1e-5, True), ("x", "emb"), lumina, (C,)),
    "WanTransformerBlock": (
        wan_block, ("hidden_states", "encoder_hidden_states", "temb"), wan, TEXT, (6, C)
    ),
    "WanTransformerBlock, a time of each token": (
        wan_block, ("hidden_states", "encoder_hidden_states", "temb"), wan, TEXT, (N, 6, C)
    ),
    "PixArt's block": (
        pixart_block, ("hidden_states", "encoder_hidden_states", "timestep"), pixart, TEXT, (6 * C,)
    ),
}  # fmt: skip


def outputs_and_gradients(function, layer: nn.Module, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    weights = list(layer.parameters())
    loss = sum((out * out.cos()).sum() for out in outputs)
    return outputs + list(torch.autograd.grad(loss, leaves + weights))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_diffusers(name, backend):
    make, names, ours, *shapes = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():  # weights of ones and biases of zeros hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = [torch.randn(B, N, C), *(torch.randn(B, *shape) for shape in shapes)]
    is_wan = isinstance(layer, WanTransformerBlock)

    def theirs(*inputs):
        more = dict(rotary_emb=None) if is_wan else {}
        return layer(**dict(zip(names, inputs, strict=True)), **more)

    expected = outputs_and_gradients(theirs, layer, inputs)
    with use_backend(backend):
        found = outputs_and_gradients(lambda *inputs: ours(layer, *inputs), layer, inputs)
    for a, b in zip(found, expected, strict=True):  # a key's bias has no gradient but noise
        assert a.shape == b.shape and (a - b).norm() <= 2e-5 * max(1, b.norm())
