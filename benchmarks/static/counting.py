"""Kernel launches, bytes and FLOPs of PyTorch code, counted on meta tensors: no GPU, no noise.

The rule. Views, empty tensors and metadata are free. Every other operation is one launch that
reads each distinct element of its inputs once (an expanded dimension counts once, a strided view
the elements it touches) and writes each output once; an operation in place reads and writes, a
copy or a fill in place only writes. Attention is one kernel that reads q, k, v and writes out,
each way. Our operators count what their launchers do: these run on the meta tensors, a Triton
launch reads or writes each tensor it is given once, and a sum over partial results that follows
it is an operation like any other. FLOPs are those of GEMMs and attention.

The roofline time of a launch is the larger of bytes over bandwidth and FLOPs over peak. All of it
is a lower bound: caches, launch latency and imperfect kernels are not in it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tim_kernels.dispatch.operators import OPERATORS
from tim_kernels.linear.op import LibraryOperator

from ..clock.machine import Limits
from .launches import Launch, launch_operator, record_launches

RULE = "each launch reads every distinct input element once and writes every output element once"
GEMM, ATTENTION, REST = "GEMM", "attention", "rest"
FP8_GEMM, FP8_RATE = "_scaled_mm", 2  # times that of a GEMM in bfloat16, where there is FP8
GEMMS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", FP8_GEMM)
PRODUCTS = tuple(name for name, op in OPERATORS.items() if isinstance(op, LibraryOperator))
OVERWRITING = ("copy_", "fill_", "zero_")


class Work(NamedTuple):
    """One kernel launch."""

    name: str
    category: str
    bytes: int
    flops: int = 0

    def seconds(self, limits: Limits) -> float:
        rate = FP8_RATE if self.name == FP8_GEMM else 1
        return max(self.bytes / limits.bandwidth, self.flops / (rate * limits.flops))


def count(function: Callable, *args) -> list[Work]:
    """Every launch that `function(*args)` makes, the second time: what happens once, like filling
    a table or moving weights together, does not count. The tensors are on the meta device."""
    for _ in range(2):
        with _Counter() as counter, _OneAttentionKernel():
            function(*args)
    return counter.work


class _OneAttentionKernel(TorchFunctionMode):
    """On the meta device PyTorch would fall back to attention from its parts."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return function(*args, **kwargs)


_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_CPU = torch._C.DispatchKey.CPU


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.work: list[Work] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.namespace == "tim_kernels" and op._overloadpacket.__name__ not in PRODUCTS:
            with record_launches(self._count_launch), self:
                return launch_operator(op, *args)
        if op.has_kernel_for_dispatch_key(_COMPOSITE) and not op.has_kernel_for_dispatch_key(_CPU):
            with self:
                return op.decompose(*args, **kwargs)
        out = op(*args, **kwargs)
        self._count(op, args, kwargs, out)
        return out

    def _count(self, op, args, kwargs, out) -> None:
        name = op._overloadpacket.__name__
        inputs, changed = _arguments(op, args, kwargs)
        owned = {_storage(tensor) for tensor in inputs + changed}
        made = [tensor for tensor in _tensors(out) if _storage(tensor) not in owned]
        if name.startswith("new_") or name.endswith("_like"):
            inputs = []
        written = _bytes(made + changed)
        if "empty" in name or torch.Tag.inplace_view in op.tags or written == 0:
            return
        formula = flop_registry.get(op._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        if name in PRODUCTS:  # of tokens and a weight, whose every number is taken once a token
            flops = 2 * args[0].shape[:-1].numel() * args[1].numel()
        self.work.append(Work(name, _category(name), _bytes(inputs) + written, flops))

    def _count_launch(self, launch: Launch) -> None:
        touched = _bytes(_tensors(launch.arguments))
        self.work.append(Work(launch.name, _category(launch.name), touched))


def _category(name: str) -> str:
    return GEMM if name in GEMMS + PRODUCTS else ATTENTION if "attention" in name else REST


def _arguments(op, args, kwargs) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operation reads, and those among its arguments that it writes."""
    read, written = [], []
    name = op._overloadpacket.__name__
    for i, argument in enumerate(op._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        written += _tensors(value) if is_written else []
        is_overwritten = is_written and (argument.kwarg_only or name in OVERWRITING)
        read += [] if is_overwritten else _tensors(value)
    return read, written


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the distinct elements of distinct views, at most once all that they are views of."""
    views = {(_storage(x), x.storage_offset(), x.shape, x.stride()): x for x in tensors}
    of_storage = defaultdict(int)
    for x in views.values():
        of_storage[_storage(x)] += _distinct(x) * x.element_size()
    whole = {_storage(x): x.untyped_storage().nbytes() for x in views.values()}
    return sum(min(touched, whole[storage]) for storage, touched in of_storage.items())


def _distinct(x: Tensor) -> int:
    return math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)


class Total(NamedTuple):
    launches: int
    bytes: int
    flops: int
    seconds: float

    def __sub__(self, other: "Total") -> "Total":
        return Total(*(a - b for a, b in zip(self, other, strict=True)))


def total(work: Iterable[Work], limits: Limits) -> Total:
    work = list(work)
    return Total(
        len(work), sum(w.bytes for w in work), sum(w.flops for w in work),
        sum(w.seconds(limits) for w in work),
    )  # fmt: skip
