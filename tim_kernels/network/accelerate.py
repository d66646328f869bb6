"""`accelerate`: somebody else's TiM on the fused ops, in one line.

A model is recognised by its tree of names, shapes and layer kinds, never by its class. Its weights
stay where they are; only `forward` of the instance is replaced, and `restore` puts it back.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MethodType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..qk_norm_rope.reference import ORDERS
from ..time_pair_embedding.reference import CONDITIONS
from . import forward as fused

# A model's own forwards, by the names of its modules: a reference to the model would keep it alive.
_ORIGINAL: WeakKeyDictionary[nn.Module, dict[str, object]] = WeakKeyDictionary()
PROBE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2}


@dataclass
class Report:
    """What `accelerate` did: names of modules that run fused, and of those left alone, and why.

    The name of the model itself is "".
    """

    fused: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fused: {name or 'the whole model'}" for name in self.fused]
        lines += [f"left:  {name or 'the model'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def accelerate(
    model: nn.Module, *, new_condition: str | None = None, rope_order: str = "upstream"
) -> Report:
    """Run a live model of the published TiM tree on the fused ops; the report says what came of it.

    The model keeps its weights and its call, `model(x, t, r, y, attn_type=…, return_zs=…, jvp=…)`,
    which returns the sample or (sample, zs); attn_type and jvp no longer matter. Its result is
    compared with the fused one on a small input first, and a model that computes something else
    is left alone. Where the tree as a whole is not TiM's, its SwiGLU layers are fused one by one.

    Args:
        new_condition: how (t, r) are embedded; read from `model.new_condition` unless given.
        rope_order: "upstream" as published, or "grid".

    Raises:
        ValueError: an unknown new_condition or rope_order.
    """
    if model in _ORIGINAL:
        return Report(left={"": "it is accelerated already; restore(model) first"})
    new_condition = new_condition or getattr(model, "new_condition", None)
    if new_condition is not None and new_condition not in CONDITIONS:
        raise ValueError(f"new_condition must be one of {CONDITIONS}, got {new_condition!r}")
    if rope_order not in ORDERS:
        raise ValueError(f"rope_order must be one of {ORDERS}, got {rope_order!r}")

    obstacles = dict(_obstacles(model, new_condition))
    if not obstacles:
        forward = _published_forward(new_condition, rope_order)
        if difference := _difference(model, forward):
            obstacles[""] = difference
        else:
            _replace(model, "", forward)
            return Report(fused=[""])
    report = Report(left=obstacles)
    for name, module in model.named_modules():
        if _is_swiglu(module):
            _replace(model, name, fused.swiglu_mlp)
            report.fused.append(name)
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: the model's own forward methods again.

    Raises:
        ValueError: the model is not accelerated.
    """
    if model not in _ORIGINAL:
        raise ValueError("this model is not accelerated")
    for name, own in _ORIGINAL.pop(model).items():
        module = model.get_submodule(name)
        del module.forward
        if own is not None:
            module.forward = own


def _replace(model: nn.Module, name: str, function) -> None:
    module = model.get_submodule(name)
    _ORIGINAL.setdefault(model, {})[name] = vars(module).get("forward")
    module.forward = MethodType(function, module)


def _published_forward(new_condition: str, rope_order: str):
    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, y: Tensor, attn_type=None, return_zs=False, jvp=False
    ):
        sample, zs = fused.tim(
            self,
            x,
            t,
            r,
            y,
            new_condition=new_condition,
            rope_order=rope_order,
            features_depth=self.encoder_depth if return_zs else None,
        )
        return (sample, zs) if return_zs else sample

    return forward


@contextlib.contextmanager
def _exact_convolution() -> Iterator[None]:
    """cuDNN rounds a float32 convolution to TF32 by default, which our GEMM does not."""
    convolution = torch.backends.cudnn.conv
    before, convolution.fp32_precision = convolution.fp32_precision, "ieee"
    try:
        yield
    finally:
        convolution.fp32_precision = before


@torch.no_grad()
def _difference(model: nn.Module, forward) -> str | None:
    """Why the fused forward is not the model's own, by trying both on a 2×3 grid of tokens."""
    proj = model.x_embedder.proj
    weight, patch = proj.weight, proj.kernel_size[0]
    if weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)

    x = noise(2, proj.in_channels, 2 * patch, 3 * patch)
    t, r = (torch.tensor(time, device=weight.device) for time in ((0.9, 0.5), (0.3, 0.1)))
    if hasattr(model.y_embedder, "embedding_table"):
        y = torch.tensor([0, model.y_embedder.embedding_table.num_embeddings - 1]).to(x.device)
    else:
        y = noise(2, 3, model.y_embedder.norm.normalized_shape[0])
    was_training = model.training
    model.eval()
    try:
        with _exact_convolution():
            own, ours = model(x, t, r, y), forward(model, x, t, r, y)
    except Exception as error:
        return f"the trial of both forwards failed: {error!r}"
    finally:
        model.train(was_training)
    if not isinstance(own, Tensor) or own.shape != ours.shape:
        return f"its forward returns {type(own).__name__}, not a sample shaped like x"
    error = (own.double() - ours.double()).norm()
    tolerance = PROBE_TOLERANCE.get(own.dtype, 5e-2)
    if own.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        tolerance = PROBE_TOLERANCE[torch.float16]  # as many bits, in other places
    if not error <= tolerance * own.double().norm() + 1e-12:
        return f"its forward computes something else (‖difference‖ = {error:.2e} on a trial input)"
    return None


def _obstacles(model: nn.Module, new_condition: str | None) -> Iterator[tuple[str, str]]:
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
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Dropout) and module.p > 0:
            yield name, f"dropout of {module.p} is not fused"
        if leaf.startswith("norm") and "." in name and not isinstance(module, nn.LayerNorm):
            yield name, f"it is a {type(module).__name__}, TiM has a LayerNorm"
        if leaf in ("q_norm", "k_norm") and not isinstance(module, (nn.LayerNorm, nn.Identity)):
            yield name, f"it is a {type(module).__name__}, TiM has LayerNorm or Identity"
    arguments = inspect.signature(model.forward).parameters
    if not {"x", "t", "r", "y", "return_zs"} <= arguments.keys():
        yield "", f"forward takes ({', '.join(arguments)}), needed are (x, t, r, y, …, return_zs)"
    if new_condition is None:
        yield "", "it has no attribute new_condition: say accelerate(model, new_condition=…)"
    if not isinstance(getattr(model, "encoder_depth", None), int):
        yield "", "it has no integer attribute encoder_depth"


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


def _is_swiglu(module: nn.Module) -> bool:
    layers = dict(module.named_children())
    return layers.keys() == {"fc1_g", "fc1_x", "fc2"} and all(
        type(layer) is nn.Linear for layer in layers.values()
    )
