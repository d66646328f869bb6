"""Somebody else's model, recognised by its tree: names, shapes and layer kinds, never its class."""

import inspect
from collections.abc import Iterator

from torch import nn

SWIGLU = {"fc1_g", "fc1_x", "fc2"}
CLASS_NORMS = ("norm1", "norm2")
TEXT_NORMS = ("norm1", "norm2_i", "norm2_t", "norm3")
DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip


def differences(model: nn.Module, new_condition: str | None) -> Iterator[tuple[str, str]]:
    """Each (module, reason) for which the tree is not the published one."""
    try:
        expected = _expected_parameters(model)
    except AttributeError as error:
        yield "", f"it is not the published tree: {error}"
        return
    actual = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            owner, _, leaf = name.rpartition(".")
            yield (
                owner,
                (
                    f"{leaf} is {actual.get(name, 'missing')}, "
                    f"TiM has {expected.get(name, 'no such parameter')}"
                ),
            )
    yield from _wrong_layers(model)
    arguments = inspect.signature(model.forward).parameters
    if not {"x", "t", "r", "y", "return_zs"} <= arguments.keys():
        yield "", f"forward takes ({', '.join(arguments)}), needed are (x, t, r, y, …, return_zs)"
    if new_condition is None:
        yield "", "it has no attribute new_condition: say accelerate(model, new_condition=…)"
    if not isinstance(getattr(model, "encoder_depth", None), int):
        yield "", "it has no integer attribute encoder_depth"


def _wrong_layers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Layers that the parameters do not tell apart, and those whose work an eval forward hides."""
    norms = {"y_embedder.norm", "final_layer.norm_final"}
    norms.update(
        f"blocks.{i}.{leaf}"
        for i, block in enumerate(model.blocks)
        for leaf in (TEXT_NORMS if hasattr(block, "cross_attn") else CLASS_NORMS)
    )
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if drop := _drop_rate(module):
            yield name, f"dropout of {drop} is not fused"
        elif name in norms:
            if not isinstance(module, nn.LayerNorm):
                yield name, f"it is a {type(module).__name__}, TiM has a LayerNorm"
        elif leaf in ("q_norm", "k_norm"):
            if not isinstance(module, (nn.LayerNorm, nn.Identity)):
                yield name, f"it is a {type(module).__name__}, TiM has LayerNorm or Identity"
        elif leaf.startswith("norm") and "." in name and type(module) is not nn.Identity:
            yield name, f"it is a {type(module).__name__}, TiM has no norm there"
        if dict(module.named_children()).keys() >= SWIGLU:
            for child, layer in _extra_layers(module):
                if not _is_idle(child, layer):
                    yield f"{name}.{child}", f"it is a {type(layer).__name__}, SwiGLU has none"
    if getattr(model.x_embedder, "dynamic_img_pad", False):
        yield "x_embedder", "it pads its input, TiM takes multiples of the patch size"


def _drop_rate(module: nn.Module) -> float:
    """Of dropout, and of timm's DropPath."""
    rate = module.p if isinstance(module, DROPOUTS) else getattr(module, "drop_prob", None)
    return rate if isinstance(rate, float | int) else 0


def _extra_layers(mlp: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, layer) for name, layer in mlp.named_children() if name not in SWIGLU)


def _is_idle(name: str, layer: nn.Module) -> bool:
    """Whether a layer beside SwiGLU's three adds nothing to them: timm's module has its activation
    as one, and a norm and two dropouts that are off unless asked for."""
    if name == "act":
        return type(layer) is nn.SiLU
    return type(layer) is nn.Identity or (type(layer) is nn.Dropout and layer.p == 0)


def _expected_parameters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published tree with this model's sizes."""
    proj = model.x_embedder.proj
    C, channels, patch, _ = proj.weight.shape
    shapes: dict[str, tuple[int, ...]] = {"x_embedder.proj.weight": (C, channels, patch, patch)}
    shapes["x_embedder.proj.bias"] = (C,)

    def linear(name: str, out: int, inner: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, inner)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def layer_norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def swiglu(name: str, inner: int, out: int) -> None:
        hidden = model.get_submodule(name).fc1_g.weight.shape[0]
        linear(f"{name}.fc1_g", hidden, inner)
        linear(f"{name}.fc1_x", hidden, inner)
        linear(f"{name}.fc2", out, hidden)

    for name in ("t_embedder", "delta_embedder"):
        if getattr(model, name, None) is not None:
            linear(f"{name}.mlp.0", C, 256)
            linear(f"{name}.mlp.2", C, C)
    is_text = not hasattr(model.y_embedder, "embedding_table")
    if is_text:
        width = model.y_embedder.norm.weight.shape[0]
        layer_norm("y_embedder.norm", width)
        swiglu("y_embedder.mlp", width, C)
    else:
        rows = model.y_embedder.embedding_table.weight.shape[0]
        shapes["y_embedder.embedding_table.weight"] = (rows, C)
    for i, block in enumerate(model.blocks):
        root = f"blocks.{i}"
        swiglu(f"{root}.adaLN_modulation", C, (9 if is_text else 6) * C)
        swiglu(f"{root}.mlp", C, C)
        linear(f"{root}.attn.qkv", 3 * C, C)
        if getattr(block.attn, "qkv_d", None) is not None:
            linear(f"{root}.attn.qkv_d", 3 * C, C, bias=False)
        for name in ("attn", "cross_attn") if is_text else ("attn",):
            attention = getattr(block, name)
            linear(f"{root}.{name}.proj", C, C)
            for norm in ("q_norm", "k_norm"):
                if isinstance(getattr(attention, norm), nn.LayerNorm):
                    layer_norm(f"{root}.{name}.{norm}", getattr(attention, norm).weight.shape[0])
        if is_text:
            linear(f"{root}.cross_attn.q", C, C)
            linear(f"{root}.cross_attn.kv", 2 * C, C)
    swiglu("final_layer.adaLN_modulation", C, 2 * C)
    linear("final_layer.linear", model.final_layer.linear.weight.shape[0], C)
    if getattr(model, "projector", None) is not None:
        for layer in (0, 2, 4):
            linear(f"projector.{layer}", *model.projector[layer].weight.shape)
    return shapes


def is_swiglu(module: nn.Module) -> bool:
    """Whether it has the layers of SwiGLU, and besides them none that computes anything."""
    layers = dict(module.named_children())
    return (
        layers.keys() >= SWIGLU
        and all(type(layers[name]) is nn.Linear for name in SWIGLU)
        and all(_is_idle(*extra) for extra in _extra_layers(module))
    )
