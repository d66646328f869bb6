"""What would run on this machine, and why."""

from collections.abc import Iterator

import torch
from torch import nn

from .attention import choice
from .attention.packed import has_varlen
from .dispatch.backend import OPS, BackendUnavailable, choose, obstacle, requested
from .launch.tuning import has_tensor_memory
from .linear import choice as linear
from .network.explanation import explain_model


def explain(model: nn.Module | None = None) -> str:
    """Print, and return, what would run for each op on this machine, and why not the others; or of
    a model, ours or accelerated, what is fused as it is now, block by block, and why not the rest.

    Example:
        >>> model.blocks[1].attn.register_forward_hook(lambda attn, args, out: None)
        >>> text = explain(model)  # blocks.1 … its output is made whole, since it has hooks
    """
    text = "\n".join(_machine() if model is None else explain_model(model))
    print(text)
    return text


def _machine() -> Iterator[str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield f"device {device}, backend {requested()!r}"
    for name in sorted(OPS):
        try:
            chosen = choose(name, device)
        except BackendUnavailable as error:
            chosen = f"none ({error})"
        others = "; ".join(
            f"not {backend}: {reason}"
            for backend in ("cuda", "triton")
            if (reason := obstacle(backend, name, device))
        )
        if name == "attention" and chosen == "triton" and has_tensor_memory(torch.device(device)):
            others = f"{others}; {SERIAL}" if others else SERIAL
        label = "attention, its tangent" if name == "attention" else name
        yield f"{label:<32}{chosen:<12}{others}"
    try:
        plain, packed = _attention(device), _packed_attention(device)
    except BackendUnavailable as error:
        plain = packed = f"none ({error})"
    yield f"{'attention without tangents':<32}{plain}"
    yield f"{'attention of packed tokens':<32}{packed}"
    yield f"{'linear layers':<32}{_linear()}"


def _linear() -> str:
    try:
        name = linear.chosen()
    except BackendUnavailable as error:
        return f"none ({error})"
    if name == "quack":
        return "quack     of many tokens in bfloat16 and float16, else PyTorch"
    reason = linear.obstacle("quack") or 'set_linear("quack") was not asked for'
    return f"PyTorch   not quack: {reason}"


SERIAL = "about a tenth of this GPU's peak by an estimate, as products wait for each other"
NAMES = {"cudnn": "PyTorch's cuDNN attention", "flash": "PyTorch's flash attention"}


def _attention(device: str) -> str:
    if device != "cuda":
        return "PyTorch   not flash-attn: it needs a CUDA device"
    name = choice.chosen()
    names, why = choice.order()
    skipped = names[: names.index(name)] if name in names else names
    others = "; ".join(f"not {other}: {choice.obstacle(other)}" for other in skipped)
    if name == "native":
        return f"PyTorch   {others or why}"
    taken = f"{NAMES.get(name, name)} for bfloat16 and float16, {why}; else PyTorch"
    return f"{taken}   {others}" if others else taken


def _packed_attention(device: str) -> str:
    other = "PyTorch, one sequence after the other (padded where their lengths are on the GPU)"
    if device != "cuda":
        return other
    name = choice.chosen()
    if name in choice.NEWEST:
        return f"{name} for bfloat16 and float16, else {other}"
    if has_varlen():
        return f"PyTorch's varlen_attn for bfloat16 and float16, else {other}"
    return f"{other}   not varlen_attn: this PyTorch or GPU has none"
