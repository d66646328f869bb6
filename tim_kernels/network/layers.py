"""The layers that network and blocks are made of, as functions of the modules that own the weights.

Weights are read where calling the module would be nothing but that (`is_plain`); everything else,
a wrapped or hooked layer, is called.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..swiglu.op import swiglu
from ..time_pair_embedding.op import TimeMLP
from .packing import pack


def is_plain(layer: nn.Module, device: torch.device | None = None) -> bool:
    """Whether calling `layer` is F.linear of its own plain weight (on `device`) and bias, and
    nothing else."""
    if type(layer) is not nn.Linear:
        return False
    own = layer.__dict__  # read as it is: this is asked of many layers at every call
    weight = own["_parameters"].get("weight")
    return (
        (type(weight) is nn.Parameter or type(weight) is Tensor)
        and (device is None or weight.device == device)
        and not (own["_forward_pre_hooks"] or own["_forward_hooks"])
        and not (own["_backward_pre_hooks"] or own["_backward_hooks"])
        and "forward" not in own  # by which weights are offloaded
    )


def swiglu_mlp(mlp: nn.Module, x: Tensor, packed: bool = False) -> Tensor:
    """fc2(silu(fc1_g(x))·fc1_x(x)); `packed` makes the two projections one GEMM where it can."""
    gate, value = mlp.fc1_g, mlp.fc1_x
    if not packed or not (is_plain(gate) and is_plain(value)):
        return mlp.fc2(swiglu(gate(x), value(x)))
    bias = None if gate.bias is None else pack((gate.bias, value.bias))
    return mlp.fc2(swiglu(F.linear(x, pack((gate.weight, value.weight)), bias)))


def time_mlp(embedder: nn.Module) -> TimeMLP:
    first, last = embedder.mlp[0], embedder.mlp[2]
    return TimeMLP(first.weight, first.bias, last.weight, last.bias)


def embed_patches(proj: nn.Conv2d, x: Tensor) -> Tensor:
    """(B, channels, H, W) → tokens (B, N, C), row-major: the patch convolution as one GEMM."""
    p = proj.kernel_size[0]
    x = x.to(proj.weight.dtype).unflatten(3, (-1, p)).unflatten(2, (-1, p))
    patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, h·w, channels·p·p)
    return F.linear(patches, proj.weight.flatten(1), proj.bias)


def unpatchify(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, h·w, p·p·c) → (B, c, h·p, w·p); a token is laid out (p_row, p_col, channel)."""
    x = x.unflatten(-1, (patch, patch, -1)).unflatten(1, grid)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
