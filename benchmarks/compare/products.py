"""Linear layers that take up what follows them, by quack-kernels, beside the same by PyTorch's
products and our kernels, and beside eager PyTorch: what is wrong, or another at a second run, is
not timed.

`set_linear("quack")` is for GPUs where all of this has passed. On a CPU references run, and times
say nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.eager import modulate
from tests.kernels.parity import DERIVATIVE, FLOOR, FORWARD
from tim_kernels import Segments, ada_layer_norm, gated_residual_ada_layer_norm, swiglu
from tim_kernels.linear import choice
from tim_kernels.linear.op import Layer, linear_gated_residual, linear_swiglu, mlp

from ..cases import eager
from ..cases.calls import maker
from ..clock.machine import exact_float32
from ..clock.timing import is_cuda, measure, side_stream
from ..record.rows import EAGER, QUACK, LeftOut, Op, Row
from .comparison import WrongAnswer

OURS = "tim_kernels"
SMALL = {"small": (2, 128, 64)}
SHAPES = {"XL, 256 tokens": (64, 256, 1152), "XL, 1024 tokens": (16, 1024, 1152)}
ODD = 3, 200, 1152  # checked and not timed: no multiple of a tile


class Case(NamedTuple):
    """A part of a block in each of three ways, of the same tensors; forward alone if not `mlp`."""

    op: str
    ways: dict[str, Callable]
    tensors: Sequence[Tensor]
    flops: int
    has_gradients: bool = False

    def run(self, way: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Outputs, and the gradients of all tensors."""
        tensors = [x.to(dtype or x.dtype).requires_grad_(self.has_gradients) for x in self.tensors]
        with torch.set_grad_enabled(self.has_gradients):
            out = self.ways[way](*tensors)
        if self.has_gradients:
            return [out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))]
        return list(out) if isinstance(out, tuple) else [out]

    def wrong(self) -> str | None:
        """What is amiss, such as an error beyond eager's by the rule of the tests."""
        with exact_float32():
            truth = self.run(EAGER, torch.float64)
        ours = self.run(QUACK)
        if not all(map(torch.equal, ours, self.run(QUACK))):
            return f"{self.op}: another result at a second run"
        for i, (a, b, exact) in enumerate(zip(ours, self.run(EAGER), truth, strict=True)):
            error, other = (float((x.double() - exact).norm()) for x in (a, b))
            factor = DERIVATIVE if self.has_gradients and i else FORWARD
            if not error <= (bound := factor * other + FLOOR * float(exact.norm())):
                return f"{self.op}, result {i}: error {error:.2e} > {bound:.2e}"
        return None


def cases(batch: int, tokens: int, width: int, device: str) -> Iterator[Case]:
    """What ends a block's products, forward, and the MLP with its gradients."""
    make, hidden = maker(torch.bfloat16, device), width * 8 // 3

    def layer(out: int, into: int) -> tuple[Tensor, Tensor]:
        return make(out, into) / into**0.5, make(out)

    x, residual, *rows = make(2, batch, tokens, width).unbind(0) + make(3, batch, width).unbind(0)
    h, last, square = make(batch, tokens, hidden), layer(width, hidden), layer(width, width)
    of_hidden = *layer(hidden, width), *layer(hidden, width)
    count = 2 * batch * tokens
    yield Case("linear, swiglu", _swiglu(), (x, *of_hidden), 2 * count * width * hidden)
    for name, y, weights in (("proj", x, square), ("fc2", h, last)):
        flops = count * width * y.shape[-1]
        tensors = y, *weights, residual, *rows
        yield Case(f"{name}, gated_residual_ada_layer_norm", _residual(None), tensors, flops)
        segments = Segments.alike(batch, tokens, device)
        packed = y.flatten(0, 1), *weights, residual.flatten(0, 1), *rows
        yield Case(f"{name}, the same, packed", _residual(segments), packed, flops)
    yield Case("mlp", _mlp(), (x, *of_hidden, *last), 9 * count * width * hidden, True)


def _swiglu() -> dict[str, Callable]:
    def by(act: Callable) -> Callable:
        return lambda x, a, b, c, d: act(F.linear(x, a, b), F.linear(x, c, d))

    def joined(x, a, b, c, d):
        return linear_swiglu(x, Layer(a, b), Layer(c, d))

    return {EAGER: by(eager.swiglu), OURS: by(swiglu), QUACK: joined}


def _mlp() -> dict[str, Callable]:
    def after(first: Callable) -> Callable:
        return lambda x, a, b, c, d, e, f: F.linear(first(x, a, b, c, d), e, f)

    def joined(x, a, b, c, d, e, f):
        return mlp(x, Layer(a, b), Layer(c, d), Layer(e, f))

    plain, ours, _ = _swiglu().values()
    return {EAGER: after(plain), OURS: after(ours), QUACK: joined}


def _residual(segments: Segments | None) -> dict[str, Callable]:
    def plain(y, weight, bias, x, gate, shift, scale):
        if segments is not None:
            y, x = (z.unflatten(0, (len(gate), -1)) for z in (y, x))
        gate, shift, scale = (row.unsqueeze(1) for row in (gate, shift, scale))
        x = x + gate * F.linear(y, weight, bias)
        out = x, modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale)
        return out if segments is None else tuple(z.flatten(0, 1) for z in out)

    def ours(y, weight, bias, x, gate, shift, scale):
        branch = F.linear(y, weight, bias)
        return gated_residual_ada_layer_norm(x, branch, gate, shift, scale, segments=segments)

    def joined(y, weight, bias, x, gate, shift, scale):
        x = linear_gated_residual(y, Layer(weight, bias), x, gate, None, segments)
        return x, ada_layer_norm(x, shift, scale, segments=segments)

    return {EAGER: plain, OURS: ours, QUACK: joined}


def rows(device: str, dry_run: bool = False) -> Iterator[Row]:
    """One for each case, way and shape in bfloat16. Whole networks are compared in networks.py.

    Raises:
        WrongAnswer: after the rows; what is wrong is not timed.
    """
    if is_cuda(device) and (reason := choice.obstacle("quack")):
        yield LeftOut("linear layers by quack", reason)
        return
    wrong = []
    with side_stream(device):
        if not dry_run:
            wrong += [case.wrong() for case in cases(*ODD, device)]
        for shape, sizes in (SMALL if dry_run else SHAPES).items():
            for case in cases(*sizes, device):
                wrong.append(case.wrong())
                if wrong[-1] is None:
                    yield from _timed(case, shape, device)
    if any(wrong):
        raise WrongAnswer("; ".join(filter(None, wrong)))


def _timed(case: Case, shape: str, device: str) -> Iterator[Op]:
    direction = "forward + backward" if case.has_gradients else "forward"
    for way in case.ways:
        run = lambda way=way: case.run(way)  # noqa: E731
        timing = measure([run], device, seconds=0.1 if is_cuda(device) else 0.02)
        yield Op(
            op=case.op, direction=direction, shape=shape, contender=way, flops=case.flops,
            tflop_per_s=case.flops / timing.ms / 1e9, **timing.fields(),
        )  # fmt: skip
