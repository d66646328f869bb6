"""Every op against its contenders, side by side: one row of numbers for each.

A row is written only for a contender whose answers are right: before it is timed, its outputs,
gradients or tangents are held against float64 by the rule of the tests, ‖out − f64‖ no more than
1.25 × (derivatives 2 ×) what eager PyTorch in the same dtype is off.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tests.kernels.parity import DERIVATIVE, FLOOR, FORWARD
from tim_kernels import use_backend

from . import peers
from .calls import Call, calls
from .contenders import Contender, contenders
from .counting import RULE, Work, count
from .machine import Limits
from .results import ratios
from .shapes import Shape
from .timing import Timing, copies, is_cuda, measure, sets_needed, side_stream, storage_bytes

DIRECTIONS = ("forward", "backward", "forward + backward", "tangent")


class Case(NamedTuple):
    """One op in one direction at one shape."""

    shape_name: str
    shape: Shape
    call: str
    direction: str

    @property
    def title(self) -> str:
        return f"{self.call}, {self.direction}, {self.shape_name}"


def shape_calls(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Call]:
    """Every call with an eager twin at a shape; those of peers need unpacked tokens."""
    everything = calls(**shape._asdict(), dtype=dtype, device=device)
    if not shape.grids:
        everything = itertools.chain(everything, peers.calls(shape, dtype, device))
    return (call for call in everything if call.eager is not None)


def cases(shapes: dict[str, Shape]) -> list[Case]:
    return [
        Case(name, shape, call.name, direction)
        for name, shape in shapes.items()
        for call in shape_calls(shape, torch.bfloat16, "meta")
        for direction in DIRECTIONS
    ]


class WrongAnswer(AssertionError):
    """A contender is off by more than it may; it gets no time."""


class Comparison:
    """The contenders of one case: their rows, in the order in which they are asked for."""

    def __init__(self, case: Case, device: str, limits: Limits, interpret: bool = False):
        self.case, self.device, self.limits, self.dtype = case, device, limits, torch.bfloat16
        self.call = next(
            call for call in shape_calls(case.shape, self.dtype, device) if call.name == case.call
        )
        self.contenders, self.left_out = contenders(self.call, device, case.direction, interpret)
        self.work = needed_work(case, self.dtype)

    def row(self, contender: Contender, seconds: float = 0.2) -> dict:
        """Check, then time.

        Raises:
            WrongAnswer: what it computes is off.
        """
        with contender.active(), side_stream(self.device):
            parity = self._check(contender)
            timing = self._time(contender, seconds)
        moved, flops = sum(w.bytes for w in self.work), sum(w.flops for w in self.work)
        bandwidth = moved / timing.ms * 1e3
        return {
            "kind": "op",
            "op": self.case.call,
            "direction": self.case.direction,
            "shape": self.case.shape_name,
            "contender": contender.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "ms": timing.ms,
            "ms_10": timing.low,
            "ms_90": timing.high,
            "timed": f"{timing.method}, {timing.rounds} rounds of {timing.sets} input sets",
            "gb_per_s": bandwidth / 1e9,
            "tflop_per_s": flops / timing.ms / 1e9,
            "share_of_limit": self.roofline_ms / timing.ms,
            "bytes": moved,
            "flops": flops,
            "counted": f"what the fused op must move: {RULE}",
            "error_vs_eager": parity,
        }

    def try_once(self, contender: Contender) -> None:
        """Run its part; nothing is checked."""
        with contender.active():
            self.thunk(contender)()

    @property
    def roofline_ms(self) -> float:
        """At the limits measured on this device, with the fused op's launches."""
        return 1e3 * sum(work.seconds(self.limits) for work in self.work)

    def _check(self, contender: Contender) -> float:
        """The largest error of an answer, as a share of what is allowed to eager · factor."""
        factor = FORWARD if self.case.direction == "forward" else DERIVATIVE
        if not hasattr(self, "_truth"):
            self._truth = self._answers(self.call.function, lambda f: f, torch.float64)
            plain = self._answers(self.call.eager, lambda f: f)
            self._yardstick = [
                float((answer.double() - truth).norm())
                for answer, truth in zip(plain, self._truth, strict=True)
            ]
        ours = self._answers(contender.function, contender.wrap)
        worst = 0.0
        for answer, truth, eager_error in zip(ours, self._truth, self._yardstick, strict=True):
            error = float((answer.double() - truth).norm())
            allowed = factor * eager_error + FLOOR * float(truth.norm())
            if not error <= allowed:
                raise WrongAnswer(
                    f"{contender.name} in {self.case.title}: error {error:.3e} > {allowed:.3e}"
                )
            worst = max(worst, error / max(allowed / factor, 1e-300))
        return worst

    def _answers(self, function: Callable, wrap: Callable, dtype=None) -> list[Tensor]:
        """What the case's direction gives, on the same question for everyone."""
        inputs = copies(self._inputs, 2)[1]  # a peer's backward writes over its own
        inputs = [t.to(dtype) if dtype and t.is_floating_point() else t for t in inputs]
        tensors, constants = inputs[: len(self.call.tensors)], inputs[len(self.call.tensors) :]
        with use_backend("reference") if dtype else contextlib.nullcontext():
            run = thunk(self.case.direction, function, wrap, tensors, constants, self.dtype)
            return _flat(run())

    def thunk(self, contender: Contender, inputs: Sequence[Tensor] | None = None) -> Callable:
        """The contender's part in this case, ready to be called; on `inputs` or its own."""
        inputs = inputs or copies(self._inputs, 2)[1]
        split = len(self.call.tensors)
        return thunk(
            self.case.direction, contender.function, contender.wrap, inputs[:split], inputs[split:],
            self.dtype,
        )  # fmt: skip

    @property
    def _inputs(self) -> tuple[Tensor, ...]:
        return (*self.call.tensors, *self.call.constants)

    def _time(self, contender: Contender, seconds: float) -> Timing:
        size = storage_bytes(self._inputs)
        size *= 1 if self.case.direction == "forward" else 2  # gradients or tangents beside them
        sets = copies(self._inputs, sets_needed(size, self.device) + 1)[1:]
        return measure([self.thunk(contender, inputs) for inputs in sets], self.device, seconds)


def thunk(
    direction: str, function: Callable, wrap: Callable, tensors, constants, dtype: torch.dtype
) -> Callable:
    """A call without arguments that does the direction's work; what comes before it is done."""

    def noise(like: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(like.device).manual_seed(seed)
        random = torch.randn(like.shape, generator=generator, device=like.device)
        return random.to(dtype).to(like.dtype)

    if direction == "forward":
        run = wrap(function)
        return lambda: run(*tensors, *constants)
    if direction == "tangent":
        tangents = tuple(noise(tensor, 200 + i) for i, tensor in enumerate(tensors))
        run = wrap(
            lambda primals, tangents: torch.func.jvp(
                lambda *x: function(*x, *constants), primals, tangents
            )[1]
        )
        return lambda: run(tuple(tensors), tangents)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    run = wrap(function)
    outputs = _flat(run(*leaves, *constants))
    cotangents = [noise(out, 100 + i) for i, out in enumerate(outputs)]
    if direction == "backward":
        return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
    return lambda: torch.autograd.grad(_flat(run(*leaves, *constants)), leaves, cotangents)


def needed_work(case: Case, dtype: torch.dtype) -> list[Work]:
    """The fused op's launches in the case's direction, on meta tensors."""
    call = next(c for c in shape_calls(case.shape, dtype, "meta") if c.name == case.call)
    with use_backend("triton"):
        if case.direction == "tangent":
            return count(call.run, "jvp")
        forward = count(call.run, "forward")
        if case.direction == "forward":
            return forward
        both = count(call.run, "backward")
    return both if case.direction == "forward + backward" else both[len(forward) :]


def _flat(outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def compare(
    case: Case, device: str, limits: Limits, seconds: float = 0.2, interpret: bool = False
) -> Iterator[dict]:
    """A row for each contender; in its place a failure, or why somebody else's was left out."""
    yield from rows(Comparison(case, device, limits, interpret), case.call, seconds)


def rows(comparison, subject: str, seconds: float) -> Iterator[dict]:
    """A comparison's rows in turn, and on `subject` who was left out of it; failures are told."""
    for name, reason in comparison.left_out.items():
        yield {"kind": "left out", "what": f"{name} in {subject}", "why": reason}
    for contender in comparison.contenders:
        try:
            yield comparison.row(contender, seconds)
        except Exception as error:
            yield excuse(contender.is_own, contender.name, comparison.case.title, error)
        if is_cuda(comparison.device):
            with contextlib.suppress(RuntimeError):  # a broken context is the caller's to find
                torch.cuda.empty_cache()


def excuse(is_own: bool, name: str, title: str, error: Exception) -> dict:
    """Instead of a row: a failure if the code is ours or eager's, and memory sufficed."""
    is_failure = is_own and not isinstance(error, torch.OutOfMemoryError)
    kind = "failure" if is_failure else "left out"
    why = f"{type(error).__name__}: {error}"
    return {"kind": kind, "what": f"{name} in {title}", "why": why[:1500]}


def summary(row: dict) -> str:
    """One line for people."""
    return (
        f"{row['op']:<44}{row['direction']:<20}{row['shape']:<24}{row['contender']:<20}"
        f"{row['ms'] * 1e3:>10.1f} µs{row['gb_per_s']:>8.0f} GB/s"
        f"{100 * row['share_of_limit']:>5.0f} %{ratios(row)}"
    )
