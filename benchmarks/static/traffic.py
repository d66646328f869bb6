"""Static cost model: launches, bytes, FLOPs and roofline time per op, block and model.

    python -m benchmarks traffic [--model c2i-xl|t2i-xl] [--gpu H100] [--bandwidth 3.0] [--ops]
    python -m benchmarks traffic --sampling [--model c2i-xl|t2i-xl]

With TIM_KERNELS_LINEAR=quack products end in what follows them, see docs/hopper.md.

Counted on meta tensors by the rule in counting.py, for the datasheet numbers of a GPU or
for numbers of your own (those that the gate measured, say). A block is the difference
between models of depth d and d − 1, so that embedders and head drop out.
"""

import argparse
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from tests.eager import EagerTiM
from tim_kernels import to_fp8, use_backend

from ..cases.calls import calls
from ..cases.shapes import MODELS, Model
from ..clock.machine import Limits
from ..record.rows import FP8
from ..record.table import Column, markdown, text
from . import sampling
from .counting import ATTENTION, GEMM, REST, Total, Work, count, total

# Bytes a second and dense bfloat16 FLOP a second, from NVIDIA's datasheets: A100 80GB SXM
# (nvidia-a100-datasheet), H100 SXM (h100-datasheet), H200 SXM (hpc-datasheet-sc23-h200), one B200
# of a DGX B200 (dgx-b200-datasheet; the sheets give FLOPs with sparsity, twice these).
GPUS = {
    "A100": Limits(2.039e12, 312e12),
    "H100": Limits(3.35e12, 989e12),
    "H200": Limits(4.8e12, 989e12),
    "B200": Limits(8.0e12, 2250e12),
}


class Budget(NamedTuple):
    """A published model at a batch; target and floor of a block are of all but GEMM, attention."""

    model: Model
    batch: int
    target: tuple[int, float]  # launches, KB a token, forward
    floor: tuple[int, float]

    @property
    def tokens(self) -> int:
        return self.batch * self.model.tokens


# The floors count each tensor once, in elements a token: 4·C for each gated residual with LayerNorm
# and modulation, 4·C for q and k, 2·C for the cross-attention's q, 8·C for SwiGLU.
BUDGETS = {
    "c2i-xl": Budget(MODELS["c2i-xl"], 256, (5, 50), (4, 20 * 1152 * 2 / 1e3)),
    "t2i-xl": Budget(MODELS["t2i-xl"], 64, (8, 65), (6, 26 * 1152 * 2 / 1e3)),
}
CONTENDERS = {  # eager: the published model as plain PyTorch; FP8: fused, on GPUs that have it
    "inference": ("eager", "reference", "fused", FP8), "training": ("eager", "reference", "fused"),
}  # fmt: skip


@functools.cache
def count_model(budget: Budget, contender: str, mode: str, depth: int | None = None) -> list[Work]:
    """One forward of a bfloat16 model, in training also its backward from a given gradient."""
    model = budget.model._replace(depth=depth)
    cls = EagerTiM
    if contender != "eager":
        from tim.models import TiMTransformer2DModel as cls
    with torch.device("meta"):
        network = cls(**model.network_params()).bfloat16()
    if contender == FP8:
        to_fp8(network.eval())
    inputs = model.meta_inputs(budget.batch, torch.bfloat16)

    def step():
        network.zero_grad()
        with torch.set_grad_enabled(mode == "training"):
            out = network(*inputs)
        if mode == "training":
            out.backward(torch.empty_like(out))

    with use_backend("triton" if contender in ("fused", FP8) else "reference"):
        return count(step)


def count_ops(budget: Budget) -> dict[str, dict[str, list[Work]]]:
    """Each op at the shapes of the budget, forward, by contender; eager where it has a twin."""
    shapes = dict(batch=budget.batch, grid=budget.model.grid, latent=budget.model.latent)
    counts = {}
    for call in calls(**shapes):
        counts[call.name] = {}
        if call.eager is not None:
            counts[call.name]["eager"] = count(call.run, "forward", call.eager)
        with use_backend("triton"):
            counts[call.name]["fused"] = count(call.run, "forward")
    return counts


def block_totals(
    budget: Budget, contender: str, mode: str, limits: Limits, by: str = "category"
) -> dict[str, Total]:
    """What one more block adds to a model, by a field of its launches."""
    more, fewer = (count_model(budget, contender, mode, depth) for depth in (3, 2))

    def part(work: Iterable[Work], key: str) -> Total:
        return total((w for w in work if getattr(w, by) == key), limits)

    keys = dict.fromkeys(getattr(w, by) for w in more)
    return {key: part(more, key) - part(fewer, key) for key in keys}


class Line(NamedTuple):
    """A line of a table: of what, and the totals of its parts."""

    label: str
    parts: dict[str, Total | None]


def _columns(part: str, forms: dict[str, str], tokens: int = 0) -> list[Column]:
    """Of a part of a line: launches and those of KB (a token), MB, GFLOP and µs with a form."""
    values = {
        "launches": lambda total: total.launches,
        "KB": lambda total: total.bytes / tokens / 1e3,
        "MB": lambda total: total.bytes / 1e6,
        "GFLOP": lambda total: total.flops / 1e9,
        "µs": lambda total: total.seconds * 1e6,
    }

    def of(line: Line, unit: str):
        total = line.parts.get(part)
        return None if total is None else values[unit](total)

    return [
        Column(f"{part} {unit}".strip(), lambda line, unit=unit: of(line, unit), form)
        for unit, form in ({"launches": "{}"} | forms).items()
    ]


def print_model(name: str, budget: Budget, limits: Limits) -> None:
    print(
        f"\n{name}, {budget.tokens:,} image tokens, bfloat16: one block, KB a token; rest is all"
        " but GEMM and attention.\nTimes are rooflines: of the rest, of the block and of the model."
        "\n"
    )
    lines = []
    for mode, contenders in CONTENDERS.items():
        for contender in contenders:
            parts = block_totals(budget, contender, mode, limits)
            parts["block"] = Total(*map(sum, zip(*parts.values(), strict=True)))
            parts["model"] = total(count_model(budget, contender, mode), limits)
            lines.append(Line(f"{mode}, {contender}", parts))
        if mode == "inference":
            for label in ("target", "floor"):
                launches, kilobytes = getattr(budget, label)
                moved = kilobytes * 1e3 * budget.tokens
                part = Total(launches, moved, 0, moved / limits.bandwidth)
                lines.append(Line(label, {REST: part}))
    columns = [
        Column("", "label"),
        *_columns(REST, {"KB": "{:.1f}", "µs": "{:.0f}"}, budget.tokens),
        *_columns(GEMM, {"KB": "{:.1f}"}, budget.tokens),
        *_columns(ATTENTION, {"KB": "{:.1f}"}, budget.tokens),
        *_columns("block", {"GFLOP": "{:.0f}", "µs": "{:.0f}"}),
        *_columns("model", {"MB": "{:,.0f}", "GFLOP": "{:,.0f}", "µs": "{:,.0f}"}),
    ]
    print(text(lines, columns))


def print_block(name: str, budget: Budget, limits: Limits, mode: str) -> None:
    print(f"\n{name}, fused, {mode}: what one block launches, KB a token\n")
    by_name = block_totals(budget, "fused", mode, limits, by="name")
    lines = [Line(operation, {"": part}) for operation, part in by_name.items() if part.bytes]
    columns = _columns("", {"KB": "{:.2f}", "GFLOP": "{:.1f}", "µs": "{:.1f}"}, budget.tokens)
    print(text(lines, [Column("operation", "label"), *columns]))


def print_ops(name: str, budget: Budget, limits: Limits) -> None:
    print(f"\n{name}: each op alone, forward; launches, MB, GFLOP and the roofline µs of all\n")
    lines = [
        Line(op, {who: total(work, limits) for who, work in by_contender.items()})
        for op, by_contender in count_ops(budget).items()
    ]
    forms = {"MB": "{:.1f}", "GFLOP": "{:.1f}", "µs": "{:.1f}"}
    columns = [*_columns("eager", forms), *_columns("fused", forms)]
    print(text(lines, [Column("op", "label"), *columns]))


def print_sampling(names: Sequence[str]) -> None:
    lines = [
        cost
        for name in names
        for batch in sampling.BATCHES[name]
        for cost in sampling.costs(name, MODELS[name], batch, GPUS)
    ]
    print(markdown(lines, sampling.columns(GPUS)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=BUDGETS, help="both by default")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--bandwidth", type=float, help="TB/s instead of the GPU's datasheet")
    parser.add_argument("--tflops", type=float, help="dense bf16 TFLOP/s instead of the datasheet")
    parser.add_argument("--ops", action="store_true", help="each op, and each launch of a block")
    parser.add_argument("--sampling", action="store_true", help="a guided step, as Markdown")
    args = parser.parse_args(argv)
    if args.sampling:
        print_sampling([args.model] if args.model else list(BUDGETS))
        return
    limits = GPUS[args.gpu]
    if args.bandwidth:
        limits = limits._replace(bandwidth=args.bandwidth * 1e12)
    if args.tflops:
        limits = limits._replace(flops=args.tflops * 1e12)
    source = f"{args.gpu} by its datasheet" if limits == GPUS[args.gpu] else "Your numbers"
    print(
        f"{source}: {limits.bandwidth / 1e12:.2f} TB/s, "
        f"{limits.flops / 1e12:.0f} dense bf16 TFLOP/s. A static count; nothing was measured."
    )
    for name, budget in BUDGETS.items():
        if args.model in (None, name):
            print_model(name, budget, limits)
            if args.ops:
                print_ops(name, budget, limits)
                for mode in CONTENDERS:
                    print_block(name, budget, limits, mode)
