"""`accelerate`: somebody else's TiM on the fused ops, in one line.

A model is recognised by its tree of names, shapes and layer kinds, never by its class. Its weights
stay where they are; only `forward` of the instance and of its blocks is replaced, and `restore`
puts them back. Blocks are still called as modules, and one that is called as published is itself.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MethodType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..names import CONDITIONS, ORDERS, Condition, RopeOrder
from .blocks import Rope, class_block, text_block
from .forward import predict
from .layers import swiglu_mlp
from .tree import differences, is_swiglu

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
    model: nn.Module, *, new_condition: Condition | None = None, rope_order: RopeOrder = "upstream"
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

    report = Report(left=dict(differences(model, new_condition)))
    if not report.left:
        if why := _fuse(model, _published_forward(new_condition, rope_order)):
            report.left[""] = why
        else:
            return Report(fused=[""])
    for name, module in model.named_modules():
        if is_swiglu(module) and _computes_swiglu(module):
            _replace(model, name, swiglu_mlp)
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


def _block_forward(block: nn.Module):
    """The fused block for the fused network, which calls it with a `Rope`; to others its own."""
    own, fused = block.forward, text_block if hasattr(block, "cross_attn") else class_block

    def forward(self, *args, **kwargs):
        if len(args) > 5 and isinstance(args[5], Rope):
            return fused(self, *args)
        return own(*args, **kwargs)

    return forward


def _published_forward(new_condition: str, rope_order: str):
    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, y: Tensor, attn_type=None, return_zs=False, jvp=False
    ):
        sample, zs = predict(
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
def _fuse(model: nn.Module, forward) -> str | None:
    """Replace the forwards of model and blocks; if that makes it another function, undo it and
    say why."""
    inputs = None if model.x_embedder.proj.weight.is_meta else _trial_inputs(model)
    was_training = model.training
    model.eval()
    try:
        with _exact_convolution():
            own = None if inputs is None else model(*inputs)
            _replace(model, "", forward)
            for i, block in enumerate(model.blocks):
                _replace(model, f"blocks.{i}", _block_forward(block))
            why = None if inputs is None else _difference(own, model.forward(*inputs))
    except Exception as error:
        why = f"the trial of both forwards failed: {error!r}"
    finally:
        model.train(was_training)
    if why and model in _ORIGINAL:
        restore(model)
    return why


def _trial_inputs(model: nn.Module) -> tuple[Tensor, ...]:
    """A small batch: a 2×3 grid of tokens, or the one size that the model takes."""
    embedder, proj = model.x_embedder, model.x_embedder.proj
    size = 2 * proj.kernel_size[0], 3 * proj.kernel_size[0]
    if getattr(embedder, "strict_img_size", False):  # timm's
        size = getattr(embedder, "img_size", None) or size
    x = _noise((2, proj.in_channels, *size), proj.weight)
    t, r = (torch.tensor(time, device=x.device) for time in ((0.9, 0.5), (0.3, 0.1)))
    if hasattr(model.y_embedder, "embedding_table"):
        y = torch.tensor([0, model.y_embedder.embedding_table.num_embeddings - 1]).to(x.device)
    else:
        y = _noise((2, 3, model.y_embedder.norm.normalized_shape[0]), proj.weight)
    return x, t, r, y


def _noise(shape: tuple[int, ...], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _difference(own: Tensor, ours: Tensor) -> str | None:
    """Why the fused result is not the model's own."""
    if not isinstance(own, Tensor) or own.shape != ours.shape:
        return f"its forward returns {type(own).__name__}, not a sample shaped like x"
    error = (own.double() - ours.double()).norm()
    tolerance = PROBE_TOLERANCE.get(own.dtype, 5e-2)
    if own.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        tolerance = PROBE_TOLERANCE[torch.float16]  # as many bits, in other places
    if not error <= tolerance * own.double().norm() + 1e-12:
        return f"its forward computes something else (‖difference‖ = {error:.2e} on a trial input)"
    return None


@torch.no_grad()
def _computes_swiglu(mlp: nn.Module) -> bool:
    """Whether layers named as SwiGLU's are used as SwiGLU's."""
    weight = mlp.fc1_g.weight
    if weight.is_meta:
        return True
    x = _noise((3, weight.shape[1]), weight)
    try:
        return _difference(mlp.forward(x), swiglu_mlp(mlp, x)) is None
    except Exception:  # whatever a stranger's forward raises
        return False
