"""Every op against its contenders, side by side: eager, torch.compile, ours, other projects'.

A row is written only for a contender whose answers are right: before it is timed, its outputs,
gradients or tangents are held against float64 by the rule of the tests, ‖out − f64‖ no more than
1.25 × (derivatives 2 ×) what eager PyTorch in the same dtype is off.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.kernels.parity import DERIVATIVE, FLOOR, FORWARD
from tim_kernels import use_backend
from tim_kernels.dispatch import backend

from ..cases import peers
from ..cases.calls import Call
from ..cases.ops import OpCase, flat, thunk
from ..clock.machine import Limits
from ..clock.timing import Timing, copies, is_cuda, measure, sets_needed, storage_bytes
from ..record.rows import COMPILE, EAGER, FUSED, Op
from ..static.counting import RULE, Total, Work, count, total
from .comparison import Comparison, Contender, WrongAnswer

COMPILED_ON_CPU = "forward + backward"
compiled = functools.partial(torch.compile, dynamic=False)  # for the very shapes it will see


def contenders(
    call: Call, device: str, direction: str, interpret: bool = False
) -> tuple[list[Contender], dict[str, str]]:
    """Those that can run this call here, eager first, and why the others can not.

    Triton's interpreter is no contender unless `interpret`: its time says nothing.
    """
    here, left_out = [Contender(EAGER, call.eager)], {}
    if is_cuda(device) or direction == COMPILED_ON_CPU:
        here.append(Contender(COMPILE, call.eager, wrap=compiled, is_own=False))
    else:
        left_out[COMPILE] = f"on a CPU only {COMPILED_ON_CPU} is compiled: it takes seconds each"
    if not is_cuda(device):
        here.append(Contender("reference", call.function, "reference"))
    for name in FUSED:
        reason = backend.obstacle(name, call.op, device)
        if name == "triton" and reason is None and not is_cuda(device) and not interpret:
            reason = "its interpreter's time says nothing about the kernel"
        if name == "cuda" and direction == "tangent":
            reason = "its tangents are Triton's"
        if reason:
            left_out[name] = reason
        else:
            here.append(Contender(name, call.function, name))
    for peer in peers.PEERS:
        if peer.call != call.name:
            continue
        if not is_cuda(device):
            left_out[peer.name] = f"it needs a CUDA device, not {device}"
        elif isinstance(kernel := peer.kernel(), str):
            left_out[peer.name] = kernel
        else:
            here.append(Contender(peer.name, kernel, is_own=False))
    return here, left_out


class OpComparison(Comparison):
    kind, counted = Op, f"what the fused op must move: {RULE}"

    def __init__(self, case: OpCase, device: str, limits: Limits, interpret: bool = False):
        super().__init__(device, limits)
        self.case, self.topic = case, case.call
        self.op = case.call_on(device)
        self._inputs = (*self.op.tensors, *self.op.constants)
        self.contenders, self.left_out = contenders(self.op, device, case.direction, interpret)

    def time(self, contender: Contender, _, seconds: float) -> tuple[Timing, dict]:
        size = storage_bytes(self._inputs)
        size *= 1 if self.case.direction == "forward" else 2  # gradients or tangents beside them
        sets = copies(self._inputs, sets_needed(size, self.device) + 1)[1:]
        timing = measure([self._thunk(contender, each) for each in sets], self.device, seconds)
        case, gb_per_s = self.case, self.work.bytes / timing.ms / 1e6
        return timing, dict(
            op=case.call, direction=case.direction, shape=case.shape_name, gb_per_s=gb_per_s
        )

    @functools.cached_property
    def work(self) -> Total:
        return total(needed_work(self.case), self.limits)

    def check(self, contender: Contender, _=None) -> float:
        factor = FORWARD if self.case.direction == "forward" else DERIVATIVE
        ours = self._answers(contender.make, contender.wrap)
        worst = 0.0
        for answer, (truth, eager_error) in zip(ours, self._truths, strict=True):
            error = float((answer.double() - truth).norm())
            allowed = factor * eager_error + FLOOR * float(truth.norm())
            if not error <= allowed:
                raise WrongAnswer(
                    f"{contender.name} in {self.case.title}: error {error:.3e} > {allowed:.3e}"
                )
            worst = max(worst, error / max(allowed / factor, 1e-300))
        return worst

    @functools.cached_property
    def _truths(self) -> list[tuple[Tensor, float]]:
        """Each answer in float64, and how far eager PyTorch is off."""
        with use_backend("reference"):
            exact = self._answers(self.op.function, lambda f: f, torch.float64)
        plain = self._answers(self.op.eager, lambda f: f)
        return [(a, float((b.double() - a).norm())) for a, b in zip(exact, plain, strict=True)]

    def _answers(self, function: Callable, wrap: Callable, dtype=None) -> list[Tensor]:
        """What the case's direction gives, on the same question for everyone."""
        inputs = copies(self._inputs, 2)[1]  # a peer's backward writes over its own
        inputs = [t.to(dtype) if dtype and t.is_floating_point() else t for t in inputs]
        return flat(self._thunk(Contender("", function, wrap=wrap), inputs)())

    def _thunk(self, contender: Contender, inputs: Sequence[Tensor]) -> Callable:
        split, case = len(self.op.tensors), self.case
        return thunk(
            case.direction, contender.make, contender.wrap, inputs[:split], inputs[split:],
            case.dtype,
        )  # fmt: skip

    def call(self, contender: Contender, _=None) -> Callable:
        return self._thunk(contender, copies(self._inputs, 2)[1])


def needed_work(case: OpCase) -> list[Work]:
    """The fused op's launches in the case's direction, on meta tensors."""
    call = case.call_on("meta")
    with use_backend("triton"):
        if case.direction == "tangent":
            return count(call.run, "jvp")
        forward = count(call.run, "forward")
        if case.direction == "forward":
            return forward
        both = count(call.run, "backward")
    return both if case.direction == "forward + backward" else both[len(forward) :]
