"""What a sampler may form before its first step: of which networks, and how it is kept.

Times and conditions of all steps are known then, so `prepare` can serve many steps at once. That is
right where the network is TiM and nothing else, since nothing else is known of what a layer does:
it may look on, draw numbers, or hang on more than its input.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..dispatch.torch_private import has_global_hooks, is_functorch_active, pytree
from .accelerate import Accelerated
from .layers import PLAIN, WEIGHTLESS

LAYERS = {nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Embedding, nn.SiLU, nn.Identity, nn.Dropout}
CONTAINERS = {nn.Sequential, nn.ModuleList}
ALIGNMENT = 256  # bytes


class Names(NamedTuple):
    """How a network embeds (t, r), and where its tokens sit."""

    new_condition: str
    rope_order: str


def names_of(model: nn.Module) -> Names:
    """Of a model to which there is no `obstacle`."""
    if isinstance(model, Accelerated):
        return Names(**model._tim_kernels[0])
    return Names(model.config.new_condition, model.config.rope_order)


def obstacle(model: nn.Module) -> str | None:
    """Why a model must be called whole at each step; None if `prepare` and `run` are as good."""
    if hasattr(model, "_orig_mod"):
        return "it is compiled"
    if not isinstance(model, Accelerated) and not hasattr(model, "runs_on_tim_kernels"):
        return f"{type(model).__name__} does not run on tim_kernels as a whole: see accelerate"
    if is_functorch_active():
        return "a transform of torch.func is under way"
    if has_global_hooks():
        return "a hook on all modules is registered"
    extras = model._tim_kernels[1] if isinstance(model, Accelerated) else ()  # not called
    skipped = {part for extra in extras for part in _modules(extra)}
    for module in _modules(model):
        why = _looks_on(module) if module in skipped else _why(module)
        if why is not None:
            name = next(name for name, part in model.named_modules() if part is module)
            return f"{name or 'the model'}: {why}"
    return None


def _modules(model: nn.Module) -> list[nn.Module]:
    """Of the whole tree, faster than `modules`: a run begins with it."""
    found, seen = [model], {model, None}
    for module in found:
        for part in module._modules.values():
            if part not in seen:
                seen.add(part)
                found.append(part)
    return found


def _looks_on(module: nn.Module) -> str | None:
    """`is_quiet`, but for FSDP2's hooks too, and fast."""
    own = module.__dict__
    if own["_forward_pre_hooks"] or own["_forward_hooks"]:
        return "it has hooks"
    if own["_backward_pre_hooks"] or own["_backward_hooks"]:
        return "it has hooks"
    if "forward" in own:
        return "its forward was replaced, as by offloading"
    return None if own.get("_compiled_call_impl") is None else "it is compiled"


def _why(module: nn.Module) -> str | None:
    kind = type(module)
    if why := _looks_on(module) or _why_not_of(kind):
        return why
    if kind is nn.Dropout and module.p and module.training:
        return "it drops out: call eval() first"
    parameters = module._parameters
    for parameter in parameters.values():
        if type(parameter) not in PLAIN:
            return f"its weight is a {type(parameter).__name__}"
    is_computed = kind in LAYERS - WEIGHTLESS and "weight" not in parameters
    return "its weight is computed" if is_computed else None


@functools.cache
def _why_not_of(kind: type[nn.Module]) -> str | None:
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        return "FSDP2 gathers its weights when it is called"
    if kind in LAYERS or kind in CONTAINERS:
        return None
    if issubclass(kind, Accelerated):
        is_ours = kind.__bases__[0] is Accelerated
    else:  # the class of its forward says so itself
        owner = next(base for base in kind.__mro__ if "forward" in vars(base))
        is_ours = "runs_on_tim_kernels" in vars(owner)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return None if is_ours else f"of a {name} is not known that its input alone matters"


class Fingerprint(NamedTuple):
    """Another one in `places` where weights are others or lie elsewhere, in `versions` where they
    were written to in place."""

    places: list[int]
    versions: list[int]


def fingerprint(model: nn.Module) -> Fingerprint:
    tensors = [
        tensor
        for module in _modules(model)
        for own in (module._parameters, module._buffers)
        for tensor in own.values()
        if tensor is not None
    ]
    versions = [0 if x.is_inference() else x._version for x in tensors]  # those count nothing
    return Fingerprint([*map(id, tensors), *(x.data_ptr() for x in tensors)], versions)


def is_text(model: nn.Module) -> bool:
    return not hasattr(model.y_embedder, "embedding_table")


def text_bytes(model: nn.Module, y: Tensor, dtype: torch.dtype) -> int:
    """Of every block's keys and values of text features y (B, L, D)."""
    return y.shape[:2].numel() * 2 * _width(model) * len(model.blocks) * dtype.itemsize


def most_bytes(model: nn.Module, rows: int, dtype: torch.dtype) -> int:
    """Of `Prepared` without text: (rows, 12C) a block and (rows, 4C) beside them, at most."""
    return rows * _width(model) * (12 * len(model.blocks) + 4) * dtype.itemsize


def _width(model: nn.Module) -> int:
    return model.x_embedder.proj.out_channels


def parts(tree, count: int) -> list:
    """A tree of tensors (count·n, …) as `count` of them of (n, …), views."""
    if count == 1:
        return [tree]
    leaves, spec = pytree.tree_flatten(tree)
    each = [x.chunk(count) if isinstance(x, Tensor) else (x,) * count for x in leaves]
    return [pytree.tree_unflatten(part, spec) for part in zip(*each, strict=True)]


class Layout:
    """Where the tensors of a tree lie in a row of bytes, by which they are copied at once.

    Each tensor of the tree is (count·n, …), n of them for each of `count` rows.
    """

    def __init__(self, tree, count: int):
        leaves, self._spec = pytree.tree_flatten(tree)
        places, self.bytes = [], 0
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                places.append(leaf)
                continue
            shape = leaf.shape[0] // count, *leaf.shape[1:]
            end = self.bytes + leaf.numel() // count * leaf.element_size()
            places.append((self.bytes, end, leaf.dtype, shape))
            self.bytes = -(-end // ALIGNMENT) * ALIGNMENT
        self.places = tuple(places)  # (begin, end, dtype, shape), or what is no tensor

    def pack(self, tree, count: int) -> Tensor:
        """(count, bytes), uint8."""
        leaves = pytree.tree_leaves(tree)
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        rows = torch.empty(count, self.bytes, dtype=torch.uint8, device=device)
        for view, leaf in zip(self._views(rows), leaves, strict=True):
            if isinstance(leaf, Tensor):
                view.copy_(leaf.reshape(view.shape))
        return rows

    def trees(self, rows: Tensor) -> list:
        """The tree of each row of (count, bytes), its tensors views."""
        leaves = [
            x.unbind(0) if isinstance(x, Tensor) else (x,) * len(rows) for x in self._views(rows)
        ]
        return [pytree.tree_unflatten(each, self._spec) for each in zip(*leaves, strict=True)]

    def _views(self, rows: Tensor) -> list:
        """Of each leaf, (count, n, …)."""
        return [
            rows[:, place[0] : place[1]].view(place[2]).unflatten(1, place[3])
            if isinstance(place, tuple)
            else place
            for place in self.places
        ]
