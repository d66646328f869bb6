"""What limits each kernel by its compiled code, beside what it is to reach: estimates, no timings.

    python -m benchmarks limits [--arch 90] [--op swiglu] [--processes 2]

Every kernel is compiled for the architecture as a published model calls it (C = 1152, head_dim 72,
bfloat16, 256 samples of 16 × 16 tokens) and judged by the model of tune/estimate.py, attention's
tangent by that of tune/attention.py. A kernel of csrc/ is launched as its launcher would, without
running it. What cannot be compiled here is listed with the reason.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what users get; Triton 3.10 will not

import torch
import triton

from tim_kernels import use_backend
from tim_kernels.launch import tuning

from ..cases.calls import calls
from ..record.table import Column, text
from ..static import extension
from ..static.blocks import launched
from ..static.cubin import ARCHITECTURES, Compiled, in_processes
from ..static.launches import record_cuda, record_launches, through_launchers
from ..static.sass import executed
from ..tune import attention
from ..tune.estimate import CHIPS, Reading, limits, read, reading, together

WIDTH, HEAD_DIM = 1152, 72
ADA, QK = "gated_residual_ada_layer_norm", "qk_norm_rope of packed qkv"


class Goal(NamedTuple):
    """A kernel as a call launches it; the aim is percent of a copy's speed, or TFLOP/s."""

    call: str
    direction: str
    backend: str
    aim: int

    @property
    def kernel(self) -> str:
        op = "ada_layer_norm" if self.call == ADA else self.call.partition(" ")[0]
        return f"{op}.{self.direction}"


GOALS = (
    Goal(ADA, "forward", "cuda", 92), Goal(ADA, "backward", "cuda", 85),
    Goal(ADA, "backward", "triton", 85), Goal(ADA, "jvp", "triton", 80),
    Goal("swiglu", "forward", "cuda", 92),
    Goal(QK, "forward", "cuda", 88), Goal(QK, "forward", "triton", 88),
    Goal(QK, "backward", "cuda", 85), Goal(QK, "backward", "triton", 85),
    Goal(QK, "jvp", "triton", 80), Goal("attention", "jvp", "triton", 400),
)  # fmt: skip


class Line(NamedTuple):
    goal: Goal
    arch: int
    reading: Reading | attention.Reading | None = None
    refusal: str | None = None  # why there is none

    @property
    def parts(self) -> dict[str, float]:
        """What could limit it: multiples of the time that memory, or attention's products, take."""
        if isinstance(self.reading, Reading):
            parts = limits(self.reading, CHIPS[self.arch])._asdict()
        else:
            parts = {name: getattr(self.reading, name) for name in attention.LIMITS}
        unit = next(iter(parts.values()))
        return {name: part / unit for name, part in parts.items()}

    @property
    def limit(self) -> str:
        """What binds, or why nobody knows."""
        return self.refusal or max(self.parts, key=self.parts.get)

    @property
    def estimate(self) -> float:
        """In the unit of the aim."""
        slowdown = together(self.parts.values())
        if isinstance(self.reading, Reading):
            return 100 / slowdown
        flops = 12 * HEAD_DIM * attention.PAIRS / (self.reading.products * slowdown)
        return flops * CHIPS[self.arch].multiprocessors * CHIPS[self.arch].clock / 1e12


def lines(arch: int, goals: Sequence[Goal] = GOALS, processes: int = 1) -> Iterator[Line]:
    """An estimate for each goal, or why there is none."""
    missing = extension.why_not()
    sources = {goal.kernel.partition(".")[0] for goal in goals if goal.backend == "cuda"}
    compiled = [] if missing or not sources else extension.read([arch], sources, processes)
    jobs = [(goal, arch) for goal in goals if goal.backend == "triton"]
    of_triton = {line.goal: line for line in in_processes(_read, jobs, processes)}
    for goal in goals:
        if goal.backend == "triton":
            yield of_triton[goal]
        elif missing:
            yield Line(goal, arch, refusal=f"not compiled: {missing}")
        else:
            yield _read_cuda(goal, arch, compiled)


def _read(goal: Goal, arch: int) -> Line:
    launches = {launch.name: launch for launch in _recorded(goal, arch, record_launches)}
    if goal.kernel not in launches:
        return Line(goal, arch, refusal="the call does not launch it")
    found = (attention.read if goal.call == "attention" else read)(launches[goal.kernel], arch)
    return Line(goal, arch, None if found.refusal else found, found.refusal)


def _recorded(goal: Goal, arch: int, record: Callable) -> list:
    """What the goal's call launches."""
    call = next(each for each in calls(WIDTH, HEAD_DIM) if each.name == goal.call)
    with (
        tuning.as_architecture(arch), use_backend("triton"),
        record_launches(), record() as found, through_launchers(goal.backend),
    ):  # fmt: skip
        call.run(goal.direction)
    return found


def _read_cuda(goal: Goal, arch: int, compiled: Sequence[tuple[Compiled, str]]) -> Line:
    operator = goal.kernel.replace(".", "_")
    args = dict(_recorded(goal, arch, record_cuda)).get(operator)
    if args is None:
        return Line(goal, arch, refusal="the call does not launch it")
    launch = launched(operator, args)
    own = [each for each in compiled if launch.is_of(each[0].kernel, each[0].call)]
    if not own:
        return Line(goal, arch, refusal=f"csrc/ has no {launch.kernel} of {launch.size}")
    ((kernel, sass),) = own
    moved = sum(x.nbytes for x in args if isinstance(x, torch.Tensor))
    run = executed(sass, launch.trips, 0 if launch.within else 1, launch.within)
    blocks = launch.blocks or round(moved / (32 * launch.warps * (run.loaded + run.stored)))
    resources = replace(kernel.resources, shared=launch.shared)
    found = reading(moved, blocks, launch.warps, resources, run, arch)
    return Line(goal, arch, None if found.refusal else found, found.refusal)


COLUMNS = (
    Column("kernel", "goal.kernel"), Column("backend", "goal.backend"),
    Column("regs", lambda line: line.reading and line.reading.registers, "{}"),
    Column("B a lane", lambda line: getattr(line.reading, "width", None), "{:.0f}"),
    Column("B in flight", lambda line: getattr(line.reading, "in_flight", None), "{:.0f}"),
    *(Column(name, lambda line, name=name: line.reading and line.parts.get(name), "{:.2f}")
      for name in (*attention.LIMITS, "fma", "alu", "double")),
    Column("estimate", lambda line: line.reading and line.estimate, "{:.0f}"),
    Column("aim", lambda line: line.goal.aim, "≥ {}"),
    Column("unit", lambda line: "TFLOP/s" if line.goal.call == "attention" else "% of copy"),
    Column("limit"),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, default=90, choices=ARCHITECTURES)
    parser.add_argument("--op", nargs="+", default=[], help="ada_layer_norm, …; all by default")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    goals = [goal for goal in GOALS if not args.op or goal.kernel.partition(".")[0] in args.op]
    chip = CHIPS[args.arch]
    print(
        f"Estimates from compiled code for sm_{args.arch} as on {chip.name}, Triton "
        f"{triton.__version__}; nothing was timed. Limits are multiples\nof the time that memory "
        f"takes ({chip.bandwidth / 1e12:.2f} TB/s), of attention the products; aims are for an "
        "H100.\n"
    )
    print(text(lines(args.arch, goals, args.processes), COLUMNS))
