"""What the blocks know of time and class, one row a sample.

c and delta do not depend on the block, so on a GPU the conditioning of all blocks is a few grouped
GEMMs before the first block (`condition_blocks`). They read every block's weights at once, which
must lie there whole and plain. Sharded, offloaded, wrapped or compiled blocks, and all on a CPU,
form their own inside their forward, by calling their layers (`condition_block`).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..swiglu.op import swiglu
from .layers import is_plain, swiglu_mlp
from .packing import pack

WITHOUT_LAUNCHES = {"cpu"}  # one large GEMM is no faster there than several small ones


class BlockConditioning(NamedTuple):
    """The rows of one block, (B, C) each but the first; the shifts are None without qkv_d.

    The values' shift reaches the output either as `v_shift`, added to the values, or, since
    softmax rows sum to one, as `value_bias`, its product with the output projection's weight.
    """

    modulation: Tensor  # (B, 6C) or (B, 9C): shift, scale, gate of each sub-layer
    q_shift: Tensor | None = None
    k_shift: Tensor | None = None
    v_shift: Tensor | None = None
    value_bias: Tensor | None = None


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 gathers the module's parameters when it is called, and only then. Told by the
    class's name: importing torch.distributed for it would cost everybody its time."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def can_group(model: nn.Module) -> bool:
    """Whether to condition all blocks at once and to pack projections: plain layers, whole and on
    one device where launches cost something.

    Inside torch.compile weights would be copied together at every call: each block reads its own.
    """
    device = model.x_embedder.proj.weight.device
    if device.type in WITHOUT_LAUNCHES or torch.compiler.is_compiling():
        return False
    if is_sharded(model) or any(map(is_sharded, model.blocks)):
        return False
    return all(is_plain(layer, device) for layer in _conditioning_layers(model.blocks))


def _conditioning_layers(blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
    is_distance_aware = _is_distance_aware(blocks[0])
    for block in blocks:
        mlp = block.adaLN_modulation
        yield from (mlp.fc1_g, mlp.fc1_x, mlp.fc2)
        if is_distance_aware:
            attn = block.attn
            yield from (attn.qkv_d, attn.proj)


def _is_distance_aware(block: nn.Module) -> bool:
    return getattr(block.attn, "qkv_d", None) is not None


def condition_block(block: nn.Module, c: Tensor, delta: Tensor) -> BlockConditioning:
    """One block's rows from c and delta (B, C), by calling its layers."""
    modulation = swiglu_mlp(block.adaLN_modulation, c)
    if not _is_distance_aware(block):
        return BlockConditioning(modulation)
    q, k, v = block.attn.qkv_d(delta).chunk(3, dim=-1)
    proj = block.attn.proj
    if is_plain(proj):
        return BlockConditioning(modulation, q, k, value_bias=F.linear(v, proj.weight))
    return BlockConditioning(modulation, q, k, v_shift=v)


def condition_blocks(
    blocks: Sequence[nn.Module], c: Tensor, delta: Tensor
) -> list[BlockConditioning]:
    """Every block's rows from c and delta (B, C), as grouped GEMMs over plain layers."""
    mlps = [block.adaLN_modulation for block in blocks]
    first = [layer for mlp in mlps for layer in (mlp.fc1_g, mlp.fc1_x)]
    hidden = _linear(c, first).unflatten(-1, (len(blocks), -1))  # (B, blocks, 2·lora)
    modulation = _grouped_linear(swiglu(hidden).transpose(0, 1), [mlp.fc2 for mlp in mlps])
    if not _is_distance_aware(blocks[0]):
        return [BlockConditioning(rows) for rows in modulation.unbind(0)]
    shifts = _linear(delta, [block.attn.qkv_d for block in blocks])
    q, k, v = shifts.unflatten(-1, (len(blocks), 3, -1)).permute(2, 1, 0, 3)  # (blocks, B, C)
    bias = _grouped_linear(v, [block.attn.proj for block in blocks], with_bias=False)
    per_block = zip(modulation.unbind(0), q.unbind(0), k.unbind(0), bias.unbind(0), strict=True)
    return [BlockConditioning(rows, q, k, value_bias=bias) for rows, q, k, bias in per_block]


def _linear(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """Layers that read the same x, side by side: (B, in) → (B, Σ out)."""
    bias = None if layers[0].bias is None else pack([layer.bias for layer in layers])
    return F.linear(x, pack([layer.weight for layer in layers]), bias)


def _grouped_linear(x: Tensor, layers: Sequence[nn.Linear], with_bias: bool = True) -> Tensor:
    """Each layer on its own input: (layers, B, in) → (layers, B, out)."""
    weight = pack([layer.weight for layer in layers]).unflatten(0, (len(layers), -1))
    if not with_bias or layers[0].bias is None:
        return torch.bmm(x, weight.mT)
    bias = pack([layer.bias for layer in layers]).view(len(layers), 1, -1)
    return torch.baddbmm(bias, x, weight.mT)
