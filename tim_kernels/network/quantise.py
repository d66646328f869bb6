"""`to_fp8`: a network's widest layers in 8 bits, for inference."""

from typing import NoReturn

import torch
from torch import nn

from .accelerate import Accelerated, Report
from .explanation import why_called
from .fp8_linear import Fp8Linear
from .layers import is_plain

LAYERS = (
    "attn.qkv", "attn.proj", "cross_attn.q", "cross_attn.proj",
    "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2",
)  # fmt: skip


@torch.no_grad()
def to_fp8(model: nn.Module) -> Report:
    """Put the blocks' products of tokens and weights into FP8 E4M3, weights and tokens, in place.

    Weights are quantised here, with a scale an output channel; tokens at every call, with a scale
    each, by the norm or SwiGLU before. Embedders, conditioning, the text's keys and values, and the
    last layer stay. It is for inference and cannot be undone: whoever needs the weights keeps them.
    Copies, pickles and state dicts are what they are for any module; `save_pretrained` is refused
    from here on, as `from_pretrained` would make a network of other weights of it. How much it
    changes what a network computes: docs/fp8.md.

    Args:
        model: of `tim.models`, or accelerated, in eval mode.

    Returns a report of the layers that are FP8 now, and of those left alone, and why: the layers
    that are not plain linear ones, such as adapted or hooked ones.

    Raises:
        ValueError: the model does not run on the fused ops, or is in training mode. The model
            raises a NotImplementedError where a call needs a gradient or a tangent.
    """
    if not (isinstance(model, Accelerated) or getattr(model, "runs_on_tim_kernels", False)):
        raise ValueError(
            f"to_fp8 needs a model on the fused ops, got a {type(model).__name__}: "
            "accelerate(model) first"
        )
    if model.training:
        raise ValueError("to_fp8 needs a model for inference, got one in training: model.eval()")
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = refuse_to_save
    report = Report()
    for i, block in enumerate(model.blocks):
        for name in LAYERS:
            owner, _, child = name.partition(".")
            if (owner := getattr(block, owner, None)) is None:
                continue
            layer = getattr(owner, child)
            if is_plain(layer):
                setattr(owner, child, Fp8Linear(layer))
                report.fused.append(f"blocks.{i}.{name}")
            else:
                report.left[f"blocks.{i}.{name}"] = why_called(layer, nn.Linear)
    return report


def refuse_to_save(*args, **options) -> NoReturn:
    """What `save_pretrained` is of a network in FP8."""
    raise ValueError(
        "a network in FP8 cannot be loaded by from_pretrained: save it before to_fp8, which makes "
        "the same of it again; torch.save and state_dict() keep it as it is"
    )
