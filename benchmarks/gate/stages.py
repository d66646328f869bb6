"""What a stage of the gate does, in a process of its own: a broken one poisons no other.

    python -m benchmarks.gate.stages NAME --rows FILE [--until TIME] [--dry-run] [--brief]

Each result is one line of JSON, written and flushed when it is there. What there was no time for
is named.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from ..cases import fp8 as fp8_cases
from ..cases import tasks
from ..cases.calls import Call, calls
from ..cases.ops import OpCase, op_cases
from ..cases.shapes import MODELS, PUBLISHED, SMALL, SMALL_MODELS, Shape
from ..cases.tasks import NetworkCase, Task
from ..clock import machine
from ..clock.machine import Limits
from ..compare.comparison import Comparison, excuse
from ..compare.networks import MAX_AUTOTUNE, NetworkComparison
from ..compare.ops import OpComparison
from ..record.rows import COMPILE, EAGER, FP8, Facts, Failure, LeftOut, Row, read

MAIN_SHAPES = ("c2i-xl, batch 64", "t2i-xl, batch 8")  # all ops; elsewhere the core ones
CORE = ("ada_layer_norm", "gated_residual_ada_layer_norm", "qk_norm_rope of packed qkv", "swiglu")
DRY_CALLS = ("transition_step",)
NEVER = 9
BY_PLAN = "by plan, as time is short: pytest benchmarks/ measures it"
COMPILING = 14  # processes that fill the compilers' caches together


class Run:
    """Where a stage runs, how long it may, and where its rows go. Cases before `skip` are done;
    a `brief` one has only those that tell most."""

    def __init__(
        self, name: str, path: Path, seconds: float, dry_run: bool, skip: int = 0,
        brief: bool = False,
    ):  # fmt: skip
        self.name, self.path, self.dry_run, self.skip = name, path, dry_run, skip
        self.brief = brief
        self.deadline = time.monotonic() + seconds
        self.device = "cpu" if dry_run else "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def emit(self, row: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row.json()) + "\n")

    def leave_out(self, what: str, why: str = "no time was left") -> None:
        self.emit(LeftOut(what, why))

    def emit_all(self, rows: Iterable[Row], rest: str) -> None:
        """While there is time; `rest` is what is left out then."""
        for row in rows:
            self.emit(row)
            if self.seconds_left < 0:
                self.leave_out(rest)
                return

    def limits(self) -> Limits:
        """Those that an earlier stage of this run measured, else measured now."""
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            match read(json.loads(line)):
                case Facts("limits", found):
                    return Limits(found["copy_gb_per_s"] * 1e9, found["gemm_tflop_per_s"] * 1e12)
        return machine.limits(self.device, quick=self.dry_run)

    def through(self, cases: list, compare: Callable[..., Iterator[Row]]) -> None:
        """Every row of every case that there is time for."""
        for done, case in enumerate(cases[self.skip :], start=self.skip + 1):
            if self.seconds_left < 0:
                self.leave_out(case.title)
                continue
            try:
                for row in compare(case):
                    self.emit(row)
                    if self.seconds_left < 0:
                        self.leave_out(f"others in {case.title}")
                        break
            except Exception as error:
                self.emit(excuse(True, "the comparison", case.title, error))
            if (reason := self._broken()) is not None:
                why = f"it left the GPU's context broken, the stage goes on in another: {reason}"
                self.emit(Failure(case.title, why))
                self._start_again(done)

    def _broken(self) -> str | None:
        """Why nothing more can be measured in this process: an illegal access lasts, and so does a
        capture that failed."""
        if self.device != "cuda":
            return None
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            return str(error)[:500]
        return None

    def _start_again(self, skip: int) -> None:
        """This stage, in a new process in place of this one, from that case on."""
        command = [sys.executable, "-m", "benchmarks.gate.stages", self.name]
        command += ["--rows", str(self.path)]
        command += ["--until", f"{self.deadline:.0f}", "--skip", str(skip)]
        command += ["--dry-run"] * self.dry_run + ["--brief"] * self.brief
        os.execv(sys.executable, command)


def describe(run: Run) -> None:
    """The machine, its state and the limits it reaches."""
    run.emit(Facts("machine", machine.describe(run.device)))
    state(run)
    limits = machine.limits(run.device, quick=run.dry_run)
    gemm = f"{machine.GEMM_SIZE}³ bf16 GEMM" if not run.dry_run else "small GEMM"
    found = {
        "copy_gb_per_s": limits.bandwidth / 1e9,
        "gemm_tflop_per_s": limits.flops / 1e12,
        "how": f"copy of {machine.COPY_BYTES / 2**30:.0f} GiB, read and written; {gemm}",
    }
    run.emit(Facts("limits", found))


def state(run: Run) -> None:
    """Clocks, temperature and power now."""
    run.emit(Facts("state", machine.state()))


def planned_ops(dry_run: bool, brief: bool = False) -> list[OpCase]:
    """The most telling first: the core ops at every shape, then all others, tangents last; if
    `brief`, the core ops at the main shapes alone."""
    if dry_run:
        return [c for c in op_cases({"small": SMALL["small, batch 2"]}) if c.call in DRY_CALLS]

    def rank(case: OpCase) -> int:
        is_tangent, is_core = case.direction == "tangent", case.call in CORE
        if case.shape_name in MAIN_SHAPES:
            return 4 if is_tangent else 1 if is_core else 3
        return 2 if is_core and not is_tangent else NEVER

    cases = op_cases(PUBLISHED, directions=("forward", "backward", "tangent"))
    return [c for c in sorted(cases, key=rank) if rank(c) < (2 if brief else NEVER)]


def fill_compiler_cache(run: Run) -> None:
    """Compile what the next stage will time, in parallel; timed is nothing here."""
    _in_parallel(run, OpComparison, planned_ops(run.dry_run, run.brief))


def fill_model_cache(run: Run) -> None:
    """The same for whole models: two blocks compile to the code of all, a graph to that of a plain
    forward, and one step of sampling to that of many."""
    one_step = tasks.SAMPLING[0]
    same = {tasks.GRAPH_TASK: tasks.FORWARD_TASK} | dict.fromkeys(tasks.SAMPLING, one_step)
    cases = [
        case._replace(
            model=case.model._replace(depth=2), task=same.get(case.task, case.task),
            only=(COMPILE,),
        )
        for case in planned_networks(run.dry_run, run.brief)
        if COMPILE in case.only
    ]  # fmt: skip
    slow_first = sorted(dict.fromkeys(cases), key=lambda case: case.task.kind != "training")
    _in_parallel(run, NetworkComparison, slow_first)


def _in_parallel(run: Run, kind: type[Comparison], cases: list) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2 if run.dry_run else min(COMPILING, max(1, len(cases)))) as pool:
        done = pool.imap_unordered(_compile, [(kind, case, run.device) for case in cases])
        for _ in cases:
            try:
                done.next(timeout=max(0.1, run.seconds_left))
            except multiprocessing.TimeoutError:
                run.leave_out("compiling ahead")
                return


def _compile(job: tuple) -> None:
    """Failures are not told: the next stage meets them again."""
    kind, case, device = job
    torch.set_num_threads(1)
    with contextlib.suppress(Exception):
        comparison = kind(case, device, Limits(1.0, 1.0))
        for contender in comparison.contenders:
            if contender.name in (COMPILE, "triton"):
                comparison.try_once(contender)
        if device == "cuda":
            torch.cuda.empty_cache()


def time_ops(run: Run) -> None:
    left = "all but the core ops at two shapes" if run.brief else "tangents and rarer ops elsewhere"
    run.leave_out(f"forward + backward; {left}", BY_PLAN)
    limits, cases = run.limits(), planned_ops(run.dry_run, run.brief)
    seconds = 0.02 if run.dry_run else 0.1
    run.through(
        cases, lambda case: OpComparison(case, run.device, limits, run.dry_run).rows(seconds)
    )


def derivative(run: Run) -> None:
    """The exact derivative against the difference: see compare/derivative.py."""
    try:
        from ..compare.derivative import rows
    except ImportError as error:  # a bare machine
        run.leave_out("derivative", str(error))
        return
    run.emit_all(rows(run.device, run.dry_run), "the rest of the derivative")


def attention(run: Run) -> None:
    """The kernels that attention without a tangent could be: see compare/attention.py."""
    from ..compare.attention import rows

    run.emit_all(rows(run.device, run.dry_run), "the rest of attention's kernels")


def products(run: Run) -> None:
    """Linear layers that take up what follows them: see compare/products.py."""
    from ..compare.products import rows

    run.emit_all(rows(run.device, run.dry_run), "the rest of the products")


def fp8(run: Run) -> None:
    """Kernels, products and golden networks in 8 bits: see compare/fp8_stage.py."""
    from ..compare import fp8_stage

    if reason := fp8_cases.why_not(run.device):
        run.leave_out("FP8", reason)
        return
    limits = run.limits()
    cases = fp8_stage.cases(run.dry_run, run.brief)
    run.through(cases, lambda case: case.rows(run.device, limits, run.dry_run))


def tuning(run: Run) -> None:
    """Tile configurations of every kernel: see tune/tuner.py."""
    if run.dry_run:
        run.leave_out("tuning", "it needs a GPU")
        return
    from ..tune.tuner import measure

    seconds = max(10.0, run.seconds_left)
    measure(run.device, seconds, note=lambda found: run.emit(Facts("tuning", found)))


def planned_networks(dry_run: bool, brief: bool = False) -> list[NetworkCase]:
    """The most telling first, each only with contenders that tell something new; if `brief`, a
    forward and a training step of each model.

    A forward is the same with our sampler as without, and the launches of a forward that is no
    graph say little beyond the middle batch. Training is at half of that: the eager step with its
    activations has to fit.
    """
    table = SMALL_MODELS if dry_run else MODELS
    graph, own = (EAGER, "accelerate", COMPILE), (EAGER, "tim", COMPILE)
    if importlib.util.find_spec("diffusers") is None:  # of our sampler's
        own += ("accelerate",)

    def at(task: Task, which: slice, only: tuple[str, ...], share: int = 1) -> list:
        return [
            NetworkCase(name, model, batch if share == 1 else max(2, batch // share), task, only)
            for name, model in table.items()
            for batch in (*model.batches[1:2], *model.batches[:1], *model.batches[2:])[which]
        ]

    one_step, four_steps, eight_steps = tasks.SAMPLING
    middle, others = slice(1), slice(1, None)
    dde, jvp = tasks.TRAINING
    not_compiled = tuple(name for name in own if name != COMPILE)
    cases = [
        *at(tasks.GRAPH_TASK, middle, (*graph, "tim", FP8)),
        *at(tasks.GRAPH_TASK, others, graph),
        *at(dde, middle, own, 2),
        *at(four_steps, middle, (*own, FP8)),
        *at(jvp, middle, not_compiled, 2),
        *at(tasks.FORWARD_TASK, middle, graph),
        *at(one_step, middle, own),
        *at(eight_steps, middle, not_compiled),
        *at(four_steps, others, not_compiled),
    ]
    if brief:  # compiled last, as it takes longest
        cases = [
            *at(tasks.GRAPH_TASK, middle, tuple(n for n in (*graph, "tim", FP8) if n != COMPILE)),
            *at(dde, middle, not_compiled, 2),
            *at(tasks.GRAPH_TASK, middle, (EAGER, COMPILE)),
        ]
    return [c for c in cases if c.task != tasks.GRAPH_TASK] if dry_run else cases


def time_models(run: Run) -> None:
    if run.brief:
        run.leave_out("all but a forward and a training step at one batch", BY_PLAN)
    else:
        run.leave_out("1 and 8 steps, training and plain forwards but at one batch", BY_PLAN)
        run.leave_out("torch.compile in 8 steps, and in 4 but at one batch", BY_PLAN)
    limits, cases = run.limits(), planned_networks(run.dry_run, run.brief)
    seconds = 0.02 if run.dry_run else 0.5
    run.through(cases, lambda case: NetworkComparison(case, run.device, limits).rows(seconds))


def max_autotune(run: Run) -> None:
    """The blocks through torch.compile's longest search."""
    if run.dry_run:
        run.leave_out(MAX_AUTOTUNE, "it needs a GPU")
        return
    limits, cases = run.limits(), planned_networks(False)[: len(MODELS)]  # of the middle batches
    cases = [case._replace(only=(MAX_AUTOTUNE,)) for case in cases]
    run.through(cases, lambda case: NetworkComparison(case, run.device, limits).rows(0.5))


def short_list(run: Run) -> None:
    """Every op once in every direction, small and oddly sized: what the sanitizer looks at."""
    from tim_kernels.dispatch import backend

    shapes = [
        Shape(2, (2, 3), (4, 4, 6), 144),
        Shape(2, (0, 0), (4, 4, 6), 72, 36, ((2, 3), (1, 1))),
    ]
    for name in ("triton", "cuda"):
        for shape in shapes:
            for call in _short_calls(shape, run.device):
                if run.dry_run and call.op not in DRY_CALLS:
                    continue
                if reason := backend.obstacle(name, call.op, run.device):
                    run.leave_out(f"{name} in {call.op}", reason)
                    continue
                backend.set_backend(name)
                for direction in call.directions:
                    call.run(direction)
    if run.device == "cuda":
        torch.cuda.synchronize()


def _short_calls(shape: Shape, device: str) -> Iterator[Call]:
    yield from calls(**shape._asdict(), dtype=torch.bfloat16, device=device)
    if not shape.grids and fp8_cases.why_not(device) is None:
        yield from fp8_cases.calls(shape, torch.bfloat16, device)


def planted_error(run: Run) -> None:
    """Ends well where nothing watches it."""
    from .planted import write_past_the_end

    write_past_the_end()


STAGES = {
    function.__name__: function
    for function in (
        describe, state, fill_compiler_cache, time_ops, derivative, attention, products, fp8,
        tuning, fill_model_cache, time_models, max_autotune, short_list, planted_error,
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=STAGES)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--until", type=float, help="when to end, by the clock time.monotonic")
    parser.add_argument("--skip", type=int, default=0, help="cases that are done")
    parser.add_argument("--brief", action="store_true", help="only the cases that tell most")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        from tests.kernels.interpreter import round_like_hardware

        round_like_hardware()
    seconds = 600.0 if args.until is None else args.until - time.monotonic()
    STAGES[args.name](Run(args.name, args.rows, seconds, args.dry_run, args.skip, args.brief))


if __name__ == "__main__":
    main()
