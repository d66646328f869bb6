"""Somebody else's model, recognised by the names of its modules and what hangs on them, never by
its class. That it also computes what TiM computes, a trial of both forwards shows."""

import inspect
from collections.abc import Iterator

from torch import nn

from .layers import is_plain

SWIGLU = {"fc1_g", "fc1_x", "fc2"}
ATTENTION = {"qkv", "q_norm", "k_norm", "proj"}
CROSS_ATTENTION = {"q", "kv", "q_norm", "k_norm", "proj"}
CHILDREN = {  # by the last name of a composite module; what is optional has a "?"
    "": {"x_embedder", "t_embedder", "delta_embedder?", "y_embedder", "blocks", "projector?",
         "final_layer"},
    "x_embedder": {"proj"},
    "t_embedder": {"mlp"},
    "delta_embedder": {"mlp"},
    "final_layer": {"norm_final", "linear", "adaLN_modulation"},
    "attn": ATTENTION | {"qkv_d?"},
    "cross_attn": CROSS_ATTENTION,
    "adaLN_modulation": SWIGLU,
}  # fmt: skip
CLASS_BLOCK = {"norm1", "attn", "norm2", "mlp", "adaLN_modulation"}
TEXT_BLOCK = {
    "norm1", "attn", "norm2_i", "norm2_t", "cross_attn", "norm3", "mlp", "adaLN_modulation",
}  # fmt: skip
IN_BLOCKS = {"attn", "cross_attn", "adaLN_modulation"}
DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip


def differences(model: nn.Module, new_condition: str | None) -> Iterator[tuple[str, str]]:
    """Each (module, reason) for which the tree is not the published one."""
    missing = [name for name in CHILDREN[""] if name[-1] != "?" and not hasattr(model, name)]
    if missing:
        yield (
            "",
            f"it is not the published tree: it has no {', '.join(sorted(missing))}; its layers can "
            "call the operations, and forward_mode() gives its attention tangents",
        )
        return
    for name, module, children in composites(model):
        yield from _wrong_children(name, module, children)
    for name, module in model.named_modules():
        if drop := _drop_rate(module):
            yield name, f"dropout of {drop} is not fused"
    if getattr(model.x_embedder, "dynamic_img_pad", False):
        yield "x_embedder", "it pads its input, TiM takes multiples of the patch size"
    arguments = inspect.signature(model.forward).parameters
    if not {"x", "t", "r", "y", "return_zs"} <= arguments.keys():
        yield "", f"forward takes ({', '.join(arguments)}), needed are (x, t, r, y, …, return_zs)"
    if new_condition is None:
        yield "", "it has no attribute new_condition: say accelerate(model, new_condition=…)"
    if not isinstance(getattr(model, "encoder_depth", None), int):
        yield "", "it has no integer attribute encoder_depth"


def composites(model: nn.Module) -> Iterator[tuple[str, nn.Module, set[str]]]:
    """The modules of TiM's tree that have modules of their own: name, module, their names."""
    is_text = not hasattr(model.y_embedder, "embedding_table")
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        if parent == "blocks":
            yield name, module, TEXT_BLOCK if is_text else CLASS_BLOCK
        elif name == "y_embedder":
            yield name, module, {"norm", "mlp"} if is_text else {"embedding_table"}
        elif leaf == "mlp" and (parent == "y_embedder" or parent.startswith("blocks.")):
            yield name, module, SWIGLU
        elif leaf in CHILDREN and (
            leaf in ("attn", "cross_attn", "adaLN_modulation") or not parent
        ):
            yield name, module, CHILDREN[leaf]


def _wrong_children(name: str, module: nn.Module, names: set[str]) -> Iterator[tuple[str, str]]:
    needed = {child for child in names if child[-1] != "?"}
    known = {child.rstrip("?") for child in names}
    if "forward" in vars(module):
        yield name, "its forward was replaced on the instance, by offloading, checkpointing or so"
    for child in sorted(needed):
        if getattr(module, child, None) is None:
            yield name, f"it has no {child}, TiM has one there"
    for child, layer in module.named_children():
        if child not in known and not _adds_nothing(child, layer, names):
            owner = "SwiGLU" if names is SWIGLU else "TiM"
            yield f"{name}.{child}".lstrip("."), f"it is a {type(layer).__name__}, {owner} has none"
    for child, parameter in module.named_parameters(recurse=False):
        yield name, f"{child} is {tuple(parameter.shape)}, TiM has no such parameter"


def _drop_rate(module: nn.Module) -> float:
    """Of dropout, and of timm's DropPath."""
    rate = module.p if isinstance(module, DROPOUTS) else getattr(module, "drop_prob", None)
    return rate if isinstance(rate, float | int) else 0


def _adds_nothing(name: str, layer: nn.Module, siblings: set[str]) -> bool:
    """Whether an additional layer computes nothing, or, as RoPE may, what the trial will judge."""
    if siblings is SWIGLU or name.startswith("norm"):
        return is_idle(name, layer) or _drop_rate(layer) > 0  # of which `differences` speaks
    return not any(True for _ in layer.parameters())


def is_idle(name: str, layer: nn.Module) -> bool:
    """Whether a layer beside SwiGLU's three adds nothing to them: timm's module has its activation
    as one, and a norm and two dropouts that are off unless asked for."""
    if name == "act":
        return type(layer) is nn.SiLU
    return type(layer) is nn.Identity or (type(layer) is nn.Dropout and layer.p == 0)


def is_swiglu(module: nn.Module) -> bool:
    """Whether it has the layers of SwiGLU, and besides them none that computes anything."""
    layers = dict(module.named_children())
    return (
        layers.keys() >= SWIGLU
        and "forward" not in vars(module)
        and all(is_plain(layers[name]) for name in SWIGLU)
        and all(is_idle(name, layer) for name, layer in layers.items() if name not in SWIGLU)
    )
