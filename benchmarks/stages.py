"""What a stage of the gate does, in a process of its own: a broken one poisons no other.

    python -m benchmarks.stages NAME --rows FILE [--seconds 100] [--dry-run]

Each result is one line of JSON, written and flushed when it is there. What there was no time for
is named.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch

from . import machine, models, ops
from .calls import DIRECTIONS, calls
from .contenders import COMPILE
from .machine import Limits
from .shapes import MODELS, PUBLISHED, SMALL, SMALL_MODELS, Shape

MAIN_SHAPES = ("c2i-xl, batch 64", "t2i-xl, batch 8")  # all ops; elsewhere the core ones
CORE = ("ada_layer_norm", "gated_residual_ada_layer_norm", "qk_norm_rope of packed qkv", "swiglu")
DRY_CALLS = ("transition_step",)
COMPILING = 8  # processes that fill the compiler's cache together


class Run:
    """Where a stage runs, how long it may, and where its rows go."""

    def __init__(self, rows: Path, seconds: float, dry_run: bool):
        self.rows, self.dry_run = rows, dry_run
        self.deadline = time.monotonic() + seconds
        self.device = "cpu" if dry_run else "cuda"

    def emit(self, row: dict) -> None:
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def limits(self) -> Limits:
        """Those that an earlier stage of this run measured, else measured now."""
        if self.rows.exists():
            for line in self.rows.read_text().splitlines():
                row = json.loads(line)
                if row["kind"] == "limits":
                    return Limits(row["copy_gb_per_s"] * 1e9, row["gemm_tflop_per_s"] * 1e12)
        return machine.limits(self.device, quick=self.dry_run)

    def through(self, cases: list, compare: Callable[..., Iterator[dict]]) -> None:
        """Every row of every case that there is time for."""
        for case in cases:
            if time.monotonic() > self.deadline:
                self.emit({"kind": "left out", "what": case.title, "why": "no time was left"})
                continue
            try:
                for row in compare(case):
                    self.emit(row)
            except Exception as error:
                self.emit(ops.excuse(True, "the comparison", case.title, error))
            if self.device == "cuda":
                torch.cuda.empty_cache()


def describe(run: Run) -> None:
    """The machine, its state and the limits it reaches."""
    run.emit({"kind": "machine"} | machine.describe(run.device))
    state(run)
    limits = machine.limits(run.device, quick=run.dry_run)
    gemm = f"{machine.GEMM_SIZE}³ bf16 GEMM" if not run.dry_run else "small GEMM"
    run.emit(
        {
            "kind": "limits",
            "copy_gb_per_s": limits.bandwidth / 1e9,
            "gemm_tflop_per_s": limits.flops / 1e12,
            "how": f"copy of {machine.COPY_BYTES / 2**30:.0f} GiB, read and written; {gemm}",
        }
    )


def state(run: Run) -> None:
    """Clocks, temperature and power now."""
    run.emit({"kind": "state"} | machine.state())


def op_cases(dry_run: bool) -> list[ops.Case]:
    """The most telling first."""
    if dry_run:
        return [c for c in ops.cases({"small": SMALL["small, batch 2"]}) if c.call in DRY_CALLS]
    everything = ops.cases(PUBLISHED)
    main = [c for c in everything if c.shape_name in MAIN_SHAPES]
    rest = [c for c in everything if c.shape_name not in MAIN_SHAPES and c.call in CORE]
    rest = [c for c in rest if c.direction in ("forward", "backward")]
    return [c for c in main if c.direction != "forward + backward"] + rest


def fill_compiler_cache(run: Run) -> None:
    """Compile what the next stage will time, in parallel; timed is nothing here."""
    cases = op_cases(run.dry_run)
    context = multiprocessing.get_context("spawn")
    with context.Pool(2 if run.dry_run else COMPILING) as pool:
        done = pool.imap_unordered(_compile, [(case, run.device) for case in cases], chunksize=1)
        for _ in cases:
            try:
                done.next(timeout=max(0.1, run.deadline - time.monotonic()))
            except multiprocessing.TimeoutError:
                run.emit({"kind": "left out", "what": "compiling ahead", "why": "no time was left"})
                return


def _compile(job: tuple[ops.Case, str]) -> None:
    """Failures are not told: the next stage meets them again."""
    case, device = job
    torch.set_num_threads(1)
    try:
        comparison = ops.Comparison(case, device, Limits(1.0, 1.0))
        for contender in comparison.contenders:
            if contender.name == COMPILE:
                with contender.active():
                    comparison.thunk(contender)()
    except Exception:
        pass
    if device == "cuda":
        torch.cuda.empty_cache()


def time_ops(run: Run) -> None:
    limits = run.limits()
    seconds = 0.02 if run.dry_run else 0.1
    run.through(
        op_cases(run.dry_run),
        lambda case: ops.compare(case, run.device, limits, seconds, interpret=run.dry_run),
    )


def derivative(run: Run) -> None:
    """The exact derivative against the difference: see benchmarks.derivative."""
    try:
        from .derivative import rows
    except ImportError as error:  # a bare machine
        run.emit({"kind": "left out", "what": "derivative", "why": str(error)})
        return
    for row in rows(run.device, run.dry_run):
        run.emit({"kind": "derivative"} | row)


def tuning(run: Run) -> None:
    """Tile configurations of every kernel: see benchmarks.tune."""
    if run.dry_run:
        run.emit({"kind": "left out", "what": "tuning", "why": "it needs a GPU"})
        return
    from .tune import measure

    seconds = max(10.0, run.deadline - time.monotonic())
    run.emit({"kind": "tuning", "tuning": measure(run.device, seconds)})


def model_cases(tasks: tuple, batches: slice, dry_run: bool) -> list[models.Case]:
    """Task by task over both models, the middle batch first."""
    table = SMALL_MODELS if dry_run else MODELS
    cases = []
    for task, (name, model) in product(tasks, table.items()):
        order = sorted(model.batches, key=lambda b: model.batches.index(b) != 1)
        cases += [models.Case(name, model, batch, task) for batch in order[batches]]
    return cases


def time_models(run: Run, cases: list[models.Case], **options) -> None:
    limits = run.limits()
    seconds = 0.02 if run.dry_run else 0.5
    run.through(cases, lambda case: models.compare(case, run.device, limits, seconds, **options))


def forward(run: Run) -> None:
    tasks = (models.GRAPH_TASK, models.FORWARD_TASK)
    time_models(run, model_cases(tasks[run.dry_run :], slice(None), run.dry_run))


def sampling(run: Run) -> None:
    tasks = models.SAMPLING[:1] if run.dry_run else models.SAMPLING
    time_models(run, model_cases(tasks, slice(2), run.dry_run))


def training(run: Run) -> None:
    """At half the middle batch: the eager step with its activations has to fit."""
    cases = [
        case._replace(batch=max(2, case.batch // 2))
        for case in model_cases(models.TRAINING, slice(1), run.dry_run)
    ]
    time_models(run, cases)


def max_autotune(run: Run) -> None:
    """The whole model through torch.compile's longest search, on its own graph."""
    if run.dry_run:
        run.emit({"kind": "left out", "what": models.MAX_AUTOTUNE, "why": "it needs a GPU"})
        return
    cases = model_cases((models.GRAPH_TASK,), slice(1), run.dry_run)
    time_models(run, cases, max_autotune=True)


def short_list(run: Run) -> None:
    """Every op once in every direction, small and oddly sized: what the sanitizer looks at."""
    from tim_kernels import backend

    shapes = [
        Shape(2, (2, 3), (4, 4, 6), 144),
        Shape(2, (0, 0), (4, 4, 6), 72, 36, ((2, 3), (1, 1))),
    ]
    for name in ("triton", "cuda"):
        for shape in shapes:
            for call in calls(**shape._asdict(), dtype=torch.bfloat16, device=run.device):
                if run.dry_run and call.op not in DRY_CALLS:
                    continue
                if reason := backend.obstacle(name, call.op, run.device):
                    run.emit({"kind": "left out", "what": f"{name} in {call.op}", "why": reason})
                    continue
                backend.set_backend(name)
                for direction in DIRECTIONS:
                    call.run(direction)
    if run.device == "cuda":
        torch.cuda.synchronize()


def planted_error(run: Run) -> None:
    """Ends well where nothing watches it."""
    from .planted import write_past_the_end

    write_past_the_end()


STAGES = {
    function.__name__: function
    for function in (
        describe, state, fill_compiler_cache, time_ops, derivative, tuning, forward, sampling,
        training, max_autotune, short_list, planted_error,
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=STAGES)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        from tests.tim_kernels.rounding import round_bfloat16_like_hardware

        round_bfloat16_like_hardware()
    STAGES[args.name](Run(args.rows, args.seconds, args.dry_run))


if __name__ == "__main__":
    main()
