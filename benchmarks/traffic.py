"""Kernel launches, bytes and FLOPs of PyTorch code, counted on meta tensors: no GPU, no noise.

    python -m benchmarks.traffic [--model c2i-xl|t2i-xl] [--gpu H100] [--ops]

The rule. Views, empty tensors and metadata are free. Every other operation is one launch that
reads each distinct element of its inputs once (an expanded dimension counts once, a strided view
the elements it touches) and writes each output once; an operation in place reads and writes, a
copy or a fill in place only writes. Attention is one kernel that reads q, k, v and writes out,
each way. Our operators count what their launchers do: these run on the meta tensors, a Triton
launch reads or writes each tensor it is given once, and a sum over partial results that follows
it is an operation like any other. FLOPs are those of GEMMs and attention.

A block is the difference between models of depth d and d − 1, so that embedders and head drop
out. The roofline time of a launch is the larger of bytes over bandwidth and FLOPs over peak. All
of it is a lower bound: caches, launch latency and imperfect kernels are not in it.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tests.eager import EagerTiM
from tim import config
from tim.models import TiMTransformer2DModel
from tim_kernels import use_backend

from .calls import calls
from .cubin import Launch, launch_operator, record_launches

GEMM, ATTENTION, REST = "GEMM", "attention", "rest"
GEMMS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
OVERWRITING = ("copy_", "fill_", "zero_")


class GPU(NamedTuple):
    """Datasheet numbers: bytes per second, dense bfloat16 FLOP per second."""

    bandwidth: float
    flops: float


GPUS = {
    "A100": GPU(2.039e12, 312e12),
    "H100": GPU(3.35e12, 989e12),
    "H200": GPU(4.8e12, 989e12),
    "B200": GPU(8.0e12, 2250e12),
}


class Work(NamedTuple):
    """One kernel launch."""

    name: str
    category: str
    bytes: int
    flops: int = 0

    def seconds(self, gpu: GPU) -> float:
        return max(self.bytes / gpu.bandwidth, self.flops / gpu.flops)


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
        if op.namespace == "tim_kernels":
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
        self.work.append(Work(name, _category(name), _bytes(inputs) + written, flops))

    def _count_launch(self, launch: Launch) -> None:
        touched = _bytes(_tensors(launch.arguments))
        self.work.append(Work(launch.name, _category(launch.name), touched))


def _category(name: str) -> str:
    return GEMM if name in GEMMS else ATTENTION if "attention" in name else REST


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
    """Of the distinct elements of distinct views."""
    views = {(_storage(x), x.storage_offset(), x.shape, x.stride()): x for x in tensors}
    return sum(
        min(_distinct(x) * x.element_size(), x.untyped_storage().nbytes()) for x in views.values()
    )


def _distinct(x: Tensor) -> int:
    return math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)


class Case(NamedTuple):
    """A published model at a batch; target and floor of a block are of all but GEMM, attention."""

    preset: str
    batch: int
    grid: tuple[int, int]
    latent: tuple[int, int, int]
    text_tokens: int
    target: tuple[int, float]  # launches, KB a token, forward
    floor: tuple[int, float]

    @property
    def tokens(self) -> int:
        return self.batch * math.prod(self.grid)


# The floors count each tensor once, in elements a token: 4·C for each gated residual with
# LayerNorm and modulation, 4·C for q and k, 2·C for the cross-attention's q, 8·C for SwiGLU.
CASES = {
    "c2i-xl": Case("xl-256", 256, (16, 16), (4, 32, 32), 0, (5, 50), (4, 20 * 1152 * 2 / 1e3)),
    "t2i-xl": Case("t2i", 64, (32, 32), (32, 32, 32), 256, (8, 65), (6, 26 * 1152 * 2 / 1e3)),
}
CONTENDERS = ("eager", "reference", "fused")  # eager: the published model as plain PyTorch
MODES = ("inference", "training")


def count_model(case: Case, contender: str, mode: str, depth: int | None = None) -> list[Work]:
    """One forward of a bfloat16 model, in training also its backward from a given gradient."""
    params = dict(config.load(case.preset).model.network.params)
    if depth is not None:
        params |= dict(depth=depth, encoder_depth=1)
    cls = EagerTiM if contender == "eager" else TiMTransformer2DModel
    with torch.device("meta"):
        model = cls(**params).bfloat16()
        x = torch.empty(case.batch, *case.latent, dtype=torch.bfloat16)
        t, r = torch.empty(2, case.batch)
        if case.text_tokens:
            y = torch.empty(case.batch, case.text_tokens, params["cap_feat_dim"], dtype=x.dtype)
        else:
            y = torch.empty(case.batch, dtype=torch.long)

    def step():
        model.zero_grad()
        with torch.set_grad_enabled(mode == "training"):
            out = model(x, t, r, y)
        if mode == "training":
            out.backward(torch.empty_like(out))

    with use_backend("triton" if contender == "fused" else "reference"):
        return count(step)


def count_ops(case: Case) -> dict[str, dict[str, list[Work]]]:
    """Each op at the shapes of the case, forward, by contender."""
    shapes = dict(batch=case.batch, grid=case.grid, latent=case.latent)
    counts = {}
    for call in calls(**shapes):
        counts[call.name] = {}
        for contender, backend in (("reference", "reference"), ("fused", "triton")):
            with use_backend(backend):
                counts[call.name][contender] = count(call.run, "forward")
    return counts


class Total(NamedTuple):
    launches: int
    bytes: int
    flops: int
    seconds: float

    def __sub__(self, other: "Total") -> "Total":
        return Total(*(a - b for a, b in zip(self, other, strict=True)))


def total(work: Iterable[Work], gpu: GPU) -> Total:
    work = list(work)
    return Total(
        len(work), sum(w.bytes for w in work), sum(w.flops for w in work),
        sum(w.seconds(gpu) for w in work),
    )  # fmt: skip


def block_totals(
    case: Case, contender: str, mode: str, gpu: GPU, by: str = "category"
) -> dict[str, Total]:
    """What one more block adds to a model, by a field of its launches."""
    more, fewer = (count_model(case, contender, mode, depth) for depth in (3, 2))

    def part(work, key):
        return total((w for w in work if getattr(w, by) == key), gpu)

    keys = dict.fromkeys(getattr(w, by) for w in more)
    return {key: part(more, key) - part(fewer, key) for key in keys}


def print_model(name: str, case: Case, gpu: GPU) -> None:
    print(
        f"\n{name}, {case.tokens:,} image tokens, bfloat16: one block, KB a token; rest is all but"
        " GEMM and attention.\nTimes are rooflines: of the rest, of the block and of the model.\n\n"
        f"{'':<22}{'rest':>16}{'GEMM':>16}{'attention':>16}{'rest':>9}{'block':>9}{'model':>9}\n"
        f"{'':<22}" + f"{'launches':>9}{'KB':>7}" * 3 + f"{'µs':>9}{'µs':>9}{'ms':>9}"
    )
    for mode in MODES:
        for contender in CONTENDERS:
            block = block_totals(case, contender, mode, gpu)
            line = f"{mode:<11}{contender:<11}"
            for category in (REST, GEMM, ATTENTION):
                kilobytes = block[category].bytes / case.tokens / 1e3
                line += f"{block[category].launches:>9}{kilobytes:>7.1f}"
            for seconds in (block[REST].seconds, sum(part.seconds for part in block.values())):
                line += f"{seconds * 1e6:>9.0f}"
            print(line + f"{total(count_model(case, contender, mode), gpu).seconds * 1e3:>9.1f}")
        if mode == "inference":
            for label, (launches, kilobytes) in (("target", case.target), ("floor", case.floor)):
                seconds = kilobytes * 1e3 * case.tokens / gpu.bandwidth
                print(f"{'':<11}{label:<11}{launches:>9}{kilobytes:>7.1f}{seconds * 1e6:>41.0f}")


def print_block(name: str, case: Case, gpu: GPU, mode: str) -> None:
    print(f"\n{name}, fused, {mode}: what one block launches\n")
    print(f"{'launches':>8}{'KB a token':>12}{'GFLOP':>9}{'µs':>9}  operation")
    for operation, part in block_totals(case, "fused", mode, gpu, by="name").items():
        print(
            f"{part.launches:>8}{part.bytes / case.tokens / 1e3:>12.2f}{part.flops / 1e9:>9.1f}"
            f"{part.seconds * 1e6:>9.1f}  {operation}"
        )


def print_ops(name: str, case: Case, gpu: GPU) -> None:
    print(f"\n{name}: each op alone, forward; a launch, MB and the roofline µs of all\n")
    columns = f"{'launches':>9}{'MB':>9}{'µs':>8}"
    print(f"{'':<32}{'reference':>26}{'fused':>26}\n{'':<32}" + columns * 2)
    for op, by_contender in count_ops(case).items():
        line = f"{op:<32}"
        for work in by_contender.values():
            part = total(work, gpu)
            line += f"{part.launches:>9}{part.bytes / 1e6:>9.1f}{part.seconds * 1e6:>8.1f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=CASES, help="both by default")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--ops", action="store_true", help="each op, and each launch of a block")
    args = parser.parse_args()
    gpu = GPUS[args.gpu]
    print(
        f"{args.gpu} by its datasheet: {gpu.bandwidth / 1e12:.2f} TB/s, "
        f"{gpu.flops / 1e12:.0f} dense bf16 TFLOP/s. A static count; nothing was measured."
    )
    for name, case in CASES.items():
        if args.model in (None, name):
            print_model(name, case, gpu)
            if args.ops:
                print_ops(name, case, gpu)
                for mode in MODES:
                    print_block(name, case, gpu, mode)


if __name__ == "__main__":
    main()
