"""What every comparison does: check each contender of a case, then time it.

A contender whose answers are wrong gets no time. `pytest benchmarks/` and the gate run the same
comparisons; `Comparison.turns` is the one for a CPU, where contenders are timed by turns.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tim_kernels import Linear, set_backend, set_linear
from tim_kernels.dispatch.backend import requested
from tim_kernels.linear import choice

from ..clock.machine import Limits
from ..clock.timing import by_turns, is_cuda, ratio, side_stream, synchronise
from ..record.rows import COMPILE, Failure, LeftOut, Row, Timed, Turns
from ..static.counting import Total


class WrongAnswer(AssertionError):
    """A contender is off by more than it may; it gets no time."""


@dataclass(frozen=True)
class Contender:
    """Of an op, `make` is the function that is called and `wrap` goes around what is run; of a
    network, `make(network, model)` prepares it."""

    name: str
    make: Callable
    backend: str | None = None
    wrap: Callable[[Callable], Callable] = lambda function: function
    is_own: bool = True  # ours, or eager PyTorch, on which everything is measured
    is_tim: bool = False  # with our sampler and objective around the network
    linear: Linear = "torch"  # whose products linear layers are
    room: float = 1.0  # how many times the error it may have that others may

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Its backend is in force; what torch.compile made is forgotten afterwards."""
        try:
            with running_on(self.backend), multiplied_by(self.linear):
                yield
        finally:
            if self.name.startswith(COMPILE):
                torch._dynamo.reset()


@contextlib.contextmanager
def running_on(name: str | None) -> Iterator[None]:
    """A backend, for the whole process: on a GPU backward runs in another thread."""
    before = requested()
    set_backend(name or before)
    try:
        yield
    finally:
        set_backend(before)


@contextlib.contextmanager
def multiplied_by(name: Linear) -> Iterator[None]:
    """The library of linear layers, for the whole process."""
    before = choice.chosen()
    set_linear(name)
    try:
        yield
    finally:
        set_linear(before)


class Comparison:
    """The contenders of one case, eager first, and why others are not among them.

    A kind of comparison has a subject(contender) that is worked on; check(contender, subject),
    which raises WrongAnswer or returns the error as a share of eager's in the same dtype;
    call(contender, subject), one run; time(contender, subject, seconds), its timing and the row's
    own fields; and work, what the fused op or network must do.
    """

    kind: type[Timed]
    counted: str  # how the work is
    case: Any
    contenders: list[Contender]
    left_out: dict[str, str]
    topic: str  # what was left out of
    work: Total

    def __init__(self, device: str, limits: Limits):
        self.device, self.limits = device, limits

    def subject(self, contender: Contender) -> Any:
        return None

    def row(self, contender: Contender, seconds: float) -> Timed:
        """Check, then time.

        Raises:
            WrongAnswer: what it computes is off.
        """
        with contender.active(), side_stream(self.device):
            subject = self.subject(contender)
            error = self.check(contender, subject)
            timing, own = self.time(contender, subject, seconds)
        work = self.work
        return self.kind(
            contender=contender.name, error_vs_eager=error, bytes=work.bytes, flops=work.flops,
            counted=self.counted, tflop_per_s=work.flops / timing.ms / 1e9,
            share_of_limit=1e3 * work.seconds / timing.ms,
            **{"dtype": name_of(self.case.dtype)} | timing.fields() | own,
        )  # fmt: skip

    def rows(self, seconds: float) -> Iterator[Row]:
        """In turn; in place of a row a failure, or why somebody else's was left out."""
        for name, reason in self.left_out.items():
            yield LeftOut(f"{name} in {self.topic}", reason)
        for contender in self.contenders:
            try:
                yield self.row(contender, seconds)
            except Exception as error:
                yield excuse(contender.is_own, contender.name, self.case.title, error)
            if is_cuda(self.device):
                with contextlib.suppress(RuntimeError):  # a broken context is the caller's to find
                    torch.cuda.empty_cache()

    def to_the_end(self, contender: Contender) -> Callable:
        """One run with its launches, to the end of its work."""
        call = self.call(contender, self.subject(contender))
        return lambda: (call(), synchronise(self.device))

    def try_once(self, contender: Contender) -> None:
        """Run it, to compile what it needs."""
        with contender.active(), side_stream(self.device):
            self.call(contender, self.subject(contender))()

    def turns(
        self, bases: Sequence[Contender], ours: Contender, rounds: int, least_ms: float = 0.0
    ) -> list[Turns]:
        """Ours timed by turns with each of the others, all of whose answers are right.

        Raises:
            WrongAnswer: some are not.
        """
        everyone, calls = (*bases, ours), []
        with running_on(ours.backend):
            for contender in everyone:
                subject = self.subject(contender)
                self.check(contender, subject)
                calls.append(self.call(contender, subject))
                calls[-1]()
            *others, own = by_turns(calls, self.device, rounds, least_ms)
        torch._dynamo.reset()
        return [
            Turns(
                subject=self.kind.kind, case=self.case.title, dtype=name_of(self.case.dtype),
                contender=ours.name, base=base.name, rounds=rounds, **ratio(ms, own)._asdict(),
            )
            for base, ms in zip(bases, others, strict=True)
        ]  # fmt: skip


def excuse(is_own: bool, name: str, title: str, error: Exception) -> LeftOut:
    """Instead of a row: a failure if the code is ours or eager's, and memory sufficed."""
    is_failure = is_own and not isinstance(error, torch.OutOfMemoryError)
    cls = Failure if is_failure else LeftOut
    return cls(f"{name} in {title}", f"{type(error).__name__}: {error}"[:1500])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
