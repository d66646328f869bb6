"""What of a model is fused, and why not the rest."""

from collections.abc import Iterator

from torch import nn

from ..dispatch.torch_private import has_global_hooks
from .accelerate import Accelerated
from .attentions import is_head_norm
from .fp8_linear import Fp8Linear
from .layers import HOOKS, PLAIN, is_plain, is_quiet, plain_time_mlp, takes_fp8


def explain_model(model: nn.Module) -> Iterator[str]:
    """A line for each block and each part beside them."""
    if not (isinstance(model, Accelerated) or getattr(model, "runs_on_tim_kernels", False)):
        alone = [name for name, part in model.named_modules() if isinstance(part, Accelerated)]
        if not alone:
            yield f"nothing of {type(model).__name__} is fused: accelerate(model) says what can be"
        yield from (f"{name} fused, by itself" for name in alone)
        return
    for name in ("t_embedder", "delta_embedder"):
        embedder = getattr(model, name, None)
        if embedder is not None and plain_time_mlp(embedder) is None:
            yield f"{name:<12} called: somebody looks on, or a layer is not plain"
    yield _line("x_embedder", _called(model.x_embedder, ("proj", nn.Conv2d)))
    for i, block in enumerate(model.blocks):
        is_fp8 = any(type(layer) is Fp8Linear for layer in block.modules())
        yield _line(f"blocks.{i}", _of_block(block), "fused, FP8" if is_fp8 else "fused")
    final = model.final_layer
    yield _line("final_layer", _looked_at("", final) + _called(final, ("norm_final", nn.LayerNorm)))


def _line(name: str, reasons: list[str], otherwise: str = "fused") -> str:
    return f"{name:<12} {'; '.join(reasons) or otherwise}"


def _of_block(block: nn.Module) -> list[str]:
    norms = ("norm1", "norm2", "norm2_i", "norm3")
    reasons = _looked_at("", block)
    reasons += _called(block, *((name, nn.LayerNorm) for name in norms if hasattr(block, name)))
    for name in ("attn", "cross_attn"):
        if (attn := getattr(block, name, None)) is not None:
            reasons += _looked_at(f"{name}: ", attn)
            norms = ((norm, getattr(attn, norm)) for norm in ("q_norm", "k_norm"))
            reasons += [
                f"{name}.{norm} is called, since {why_called(layer, nn.LayerNorm, nn.Identity)}"
                for norm, layer in norms
                if not is_head_norm(layer)
            ]
            if getattr(attn, "qkv_d", None) is not None and not takes_fp8(attn, "proj"):
                projection = _called(attn, ("proj", nn.Linear))
                reasons += [f"{name}.{reason}, values are shifted" for reason in projection]
    return reasons


def _looked_at(name: str, module: nn.Module) -> list[str]:
    if is_quiet(module):
        return []
    return [f"{name}its output is made whole, since {why_called(module, type(module))}"]


def _called(owner: nn.Module, *layers: tuple) -> list[str]:
    """Those of the owner's layers, of these kinds, that are called instead of fused, and why."""
    children = [(name, getattr(owner, name), kind) for name, kind in layers]
    return [
        f"{name} is called, since {why_called(layer, kind)}"
        for name, layer, kind in children
        if not is_plain(layer, kind)
    ]


def why_called(layer: nn.Module, *kinds: type) -> str:
    own = vars(layer)
    if type(layer) not in kinds:
        return f"it is a {type(layer).__name__}"
    if "forward" in own:
        return "its forward was replaced, as by offloading"
    if any(own[hooks] for hooks in HOOKS):
        return "it has hooks"
    if has_global_hooks():
        return "a hook on all modules is registered"
    if own.get("_compiled_call_impl") is not None:
        return "it is compiled by itself"
    kept = own["_parameters"]
    odd = [type(p).__name__ for p in kept.values() if type(p) not in PLAIN]
    if odd:
        return f"its weight is a {odd[0]}"
    return "it is a LayerNorm without a weight" if "weight" in kept else "its weight is computed"
