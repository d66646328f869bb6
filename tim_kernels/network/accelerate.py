"""`accelerate`: somebody else's TiM on the fused ops, in one line.

A model is recognised by its tree of names and what hangs on it, never by its class. Its modules get
subclasses of their classes whose `forward` is ours, and `restore` gives them their own back. So
hooks, copies, pickles, replicas and state dicts are what they are for any module.
"""

import functools
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..names import CONDITIONS, ORDERS, Condition, RopeOrder
from . import attentions, blocks, layers, trial
from .forward import predict
from .packing import Packing, check_packed
from .tree import CHILDREN, SWIGLU, composites, differences, is_swiglu

CHECKPOINTS = "use_checkpoint", "gradient_checkpointing"  # a model's own switches


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
    which returns the sample or (sample, zs); attn_type and jvp no longer matter, and it takes
    pictures of different sizes with `packing`, see `pack`. Its result is
    compared with the fused one on a small input first, and a model that computes something else
    is left alone. Where the tree as a whole is not TiM's, its SwiGLU layers are fused one by one.

    Args:
        new_condition: how (t, r) are embedded; read from `model.new_condition` unless given.
        rope_order: "upstream" as published, or "grid".

    Raises:
        ValueError: an unknown new_condition or rope_order.
    """
    if why := _why_not(model):
        return Report(left={"": why})
    new_condition = new_condition or getattr(model, "new_condition", None)
    if new_condition is not None and new_condition not in CONDITIONS:
        raise ValueError(f"new_condition must be one of {CONDITIONS}, got {new_condition!r}")
    if rope_order not in ORDERS:
        raise ValueError(f"rope_order must be one of {ORDERS}, got {rope_order!r}")

    report = Report(left=dict(differences(model, new_condition)))
    if not report.left:
        names = dict(new_condition=new_condition, rope_order=rope_order)
        if why := _fuse(model, names):
            report.left[""] = why
        else:
            return Report(fused=[""])
    for name, module in model.named_modules():
        if is_swiglu(module) and trial.computes_swiglu(module):
            _accelerate(module, "swiglu")
            report.fused.append(name)
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: the model's own forward methods again.

    Raises:
        ValueError: the model is not accelerated, or its modules have become something else since.
    """
    accelerated = [module for module in model.modules() if isinstance(module, Accelerated)]
    if not accelerated:
        raise ValueError("this model is not accelerated")
    for module in accelerated:
        if type(module).__bases__ != (Accelerated, module.own):
            raise ValueError(
                f"a module was an accelerated {module.own.__name__} and is now a "
                f"{type(module).__name__}: undo first what was done after accelerate"
            )
    for module in accelerated:
        module.__class__ = module.own
    vars(model).pop("_tim_kernels", None)


def _why_not(model: nn.Module) -> str | None:
    """Why a model is no candidate at all."""
    if any(isinstance(module, Accelerated) for module in model.modules()):
        return "it is accelerated already; restore(model) first"
    if getattr(model, "runs_on_tim_kernels", False):
        return "it runs on the fused ops as it is"
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        return "it is compiled: accelerate the model first, then compile it"
    return None


def _fuse(model: nn.Module, names: dict[str, str]) -> str | None:
    """Give model and modules our forwards; if that makes it another function, undo it and say
    why."""
    own, why = trial.of_own(model)
    has_switch = any(hasattr(model, switch) for switch in CHECKPOINTS)
    if own is not None and own.is_checkpointed and not has_switch:
        why = f"it checkpoints its blocks, but has no {' or '.join(CHECKPOINTS)} to tell when"
    if why is None:
        _accelerate_tree(model, names)
        why = own and trial.difference(own, model)
        if why:
            restore(model)
    return why


def _accelerate_tree(model: nn.Module, names: dict[str, str]) -> None:
    extras = []  # layers that compute nothing, and are not called
    for name, module, children in list(composites(model)):
        known = {child.rstrip("?") for child in children}
        role = "swiglu" if children is SWIGLU else name.rpartition(".")[2] or "model"
        if name.startswith("blocks.") and role.isdecimal():
            role = "block"
        if role != "swiglu":
            extras += (layer for child, layer in module.named_children() if child not in known)
        _accelerate(module, role)
    model._tim_kernels = names, tuple(extras)


def _accelerate(module: nn.Module, role: str) -> None:
    module.__class__ = _accelerated_class(type(module), role)


class Accelerated:
    """What an accelerated module is beside its own class, `own`; its `role` tells its forward."""

    own: type[nn.Module]
    role: str

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _made_again, (self.own, self.role), *state


def _made_again(own: type[nn.Module], role: str) -> nn.Module:
    kind = _accelerated_class(own, role)
    return kind.__new__(kind)


@functools.cache
def _accelerated_class(own: type[nn.Module], role: str) -> type[nn.Module]:
    forward = functools.wraps(own.forward)(FORWARDS[role])
    names = dict(own=own, role=role, forward=forward, __module__=own.__module__)
    return type(own.__name__, (Accelerated, own), names | dict(__qualname__=own.__qualname__))


def _model(
    self, x: Tensor, t: Tensor, r: Tensor, y: Tensor, attn_type=None, return_zs=False, jvp=False,
    packing: Packing | None = None, **others,
):  # fmt: skip
    names, extras = self._tim_kernels
    if not all(map(layers.is_quiet, extras)):
        args = dict(x=x, t=t, r=r, y=y, attn_type=attn_type, return_zs=return_zs, jvp=jvp)
        args |= {} if packing is None else dict(packing=packing)  # which it refuses
        return self.own.forward(self, **args, **others)
    if others:
        raise ValueError(f"an accelerated model takes no {', '.join(others)}: restore(model) first")
    if packing is not None:
        _check_packed(self, x, t, r, y, packing)
    is_checkpointed = any(getattr(self, switch, False) for switch in CHECKPOINTS)
    sample, zs = predict(
        self, x, t, r, y, **names, features_depth=self.encoder_depth if return_zs else None,
        checkpoint=_checkpoint if is_checkpointed else None, packing=packing,
    )  # fmt: skip
    return (sample, zs) if return_zs else sample


def _check_packed(model, x: Tensor, t: Tensor, r: Tensor, y: Tensor, packing: Packing) -> None:
    patches = model.x_embedder.proj
    check_packed(x, packing, patches.in_channels, patches.kernel_size[0])
    for name, of in (("t", t), ("r", r), ("y", y)):
        if of.shape[:1] != (len(packing),):
            raise ValueError(f"{name} must be of {len(packing)} pictures, got {tuple(of.shape)}")


def _checkpoint(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def _block(self, *args, **kwargs):
    """Ours for the network, which calls it with a `Rope`; to others their own."""
    if not (len(args) > 5 and isinstance(args[5], attentions.Rope)):
        return self.own.forward(self, *args, **kwargs)
    return (blocks.text_block if hasattr(self, "cross_attn") else blocks.class_block)(self, *args)


def _with_rope(function):
    def forward(self, *args, **kwargs):
        if not (len(args) == 3 and isinstance(args[2], attentions.Rope)):
            return self.own.forward(self, *args, **kwargs)
        return function(self, *args)

    forward.function = function
    return forward


def _of_tensors(function, count: int, known: set[str]):
    """Ours where it is called with `count` tensors and nothing else, and nobody looks at a layer
    that we do not call."""

    def forward(self, *args, **kwargs):
        others = (layer for name, layer in self._modules.items() if name not in known)
        if kwargs or len(args) != count or not all(map(layers.is_quiet, filter(None, others))):
            return self.own.forward(self, *args, **kwargs)
        return function(self, *args)

    forward.function = function
    return forward


def _embed_condition(embedder: nn.Module, y: Tensor) -> Tensor:
    is_label = hasattr(embedder, "embedding_table")
    return (layers.embed_label if is_label else layers.embed_text)(embedder, y)


FORWARDS = {
    "model": _model,
    "x_embedder": _of_tensors(layers.embed_patches, 1, {"proj"}),
    "t_embedder": _of_tensors(layers.embed_time, 1, {"mlp"}),
    "delta_embedder": _of_tensors(layers.embed_time, 1, {"mlp"}),
    "y_embedder": _of_tensors(_embed_condition, 1, {"embedding_table", "norm", "mlp"}),
    "block": _block,
    "attn": _with_rope(attentions.self_attention),
    "cross_attn": _with_rope(attentions.cross_attention),
    "swiglu": _of_tensors(layers.swiglu_mlp, 1, SWIGLU),
    "final_layer": _of_tensors(blocks.final_layer, 2, CHILDREN["final_layer"]),
}
