"""How exact dF/dt is and what it costs: the difference quotient (DDE) and forward mode (JVP).

    python -m benchmarks derivative [--device cuda] [--quick] [--json rows.json]

dF/dt of a network of XL blocks with noise for weights, against forward mode in float64 on the same
weights: by the published eager code, whose forward mode materialises the N×N scores, and by ours.
Then, on a GPU, the tangent of attention alone against PyTorch's composite attention under forward
mode, jvp_flash_attention where it is installed and can, and two plain forwards, the price of DDE.

An error is ‖x − f64‖ / ‖f64‖; FLOPs are those of GEMMs and attention; memory is what a call
allocates at its peak beyond what was there.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tests.eager import EagerTiM, attend, randomise
from tests.kernels.parity import DERIVATIVE, FLOOR
from tim_kernels import attention, use_backend

from ..cases import eager, published
from ..cases.peers import ATTENTION as ATTENTION_CALL
from ..cases.peers import PEERS
from ..cases.shapes import SMALL_MODELS, Model
from ..clock.machine import exact_float32
from ..clock.timing import copies, is_cuda, measure, sets_needed, side_stream, storage_bytes
from ..record import table
from ..record.rows import Derivative, LeftOut, Row
from .comparison import WrongAnswer, name_of

DTYPES = torch.bfloat16, torch.float32, torch.float16  # the one that is trained in first
XL = Model("xl-256", (16, 16), (4, 32, 32), 0, (8,), depth=8)
XL_ON_CPU = Model("xl-256", (8, 8), (4, 16, 16), 0, (2,), depth=2)
(SMALL,) = SMALL_MODELS.values()
ATTENTION = {  # (batch, tokens, heads, head_dim)
    "B, 256 tokens": (64, 256, 12, 64),
    "XL, 256 tokens": (64, 256, 16, 72),
    "XL, 1024 tokens": (8, 1024, 16, 72),
    "XL, 1000 tokens": (8, 1000, 16, 72),
    "XL, 4096 tokens": (2, 4096, 16, 72),
}
PLAIN = "two plain forwards, SDPA"


def rows(device: str, quick: bool = False) -> Iterator[Row]:
    """One row for each measurement; one left out, with the reason, for each that is not made.

    `quick` is a network small enough for any CPU.

    Raises:
        WrongAnswer: after the rows that say so.
    """
    model = SMALL if quick else XL if is_cuda(device) else XL_ON_CPU
    if importlib.util.find_spec("diffusers") is None:
        yield LeftOut("dF/dt of a network", "diffusers is missing")
    else:
        with exact_float32():
            yield from network_rows(model, device)
    if is_cuda(device):
        yield from attention_rows(device)
        return
    for what in ("time and memory of dF/dt", "the tangent of attention in Triton"):
        yield LeftOut(what, f"it needs a CUDA device, not {device}")


class Problem:
    """A network of XL blocks in a dtype, and a batch on the trajectory; the same for every dtype
    but for the rounding of the weights."""

    def __init__(self, model: Model, dtype: torch.dtype, device: str):
        from tim.models import TiMTransformer2DModel  # needs diffusers

        params = model.network_params()
        self.eager = randomise(EagerTiM(**params)).to(device, dtype).requires_grad_(False)
        self.ours = TiMTransformer2DModel(**params).to(device, dtype).requires_grad_(False)
        self.ours.load_state_dict(self.eager.state_dict())
        g = torch.Generator().manual_seed(1)
        batch = model.batches[0]
        self.x, self.z = torch.randn(2, batch, *model.latent, generator=g).to(device)
        self.t = (torch.rand(batch, generator=g) * 0.6 + 0.3).to(device)
        self.r = self.t / 2
        self.y = torch.randint(params["num_classes"], (batch,), generator=g).to(device)

    def derivative(self, contender: str, kind: str) -> Tensor:
        if contender == "eager":
            return self._published(kind, self.x.dtype)
        from tim.objective import TransitionObjective
        from tim.transports import make

        objective = TransitionObjective(make("OT_FM"), derivative_type=kind)
        return objective.derivative(self.ours, self.x, self.z, self.y, self.t, self.r)

    def exact(self) -> Tensor:
        """In float64, on the rounded weights."""
        self.eager.double()
        try:
            return self._published("jvp", torch.float64)
        finally:
            self.eager.to(next(self.ours.parameters()).dtype)

    @torch.no_grad()
    def _published(self, kind: str, dtype: torch.dtype) -> Tensor:
        x, z, t, r = (v.to(dtype) for v in (self.x, self.z, self.t, self.r))
        return published.derivative(self.eager, x, z, t, r, self.y, kind)


def network_rows(model: Model, device: str) -> Iterator[Row]:
    backend = "triton" if is_cuda(device) else "reference"
    case = dict(
        what="dF/dt", network=model.preset, depth=model.depth, tokens=model.tokens,
        batch=model.batches[0],
    )  # fmt: skip
    wrong = []
    for dtype in DTYPES:
        problem = Problem(model, dtype, device)
        exact = problem.exact()
        for kind in ("dde", "jvp"):
            errors: dict[str, float] = {}
            for contender in ("eager", "tim"):
                with use_backend(backend), side_stream(device):
                    out, cost = _cost(lambda: problem.derivative(contender, kind), device=device)  # noqa: B023
                errors[contender] = error = _error(out, exact)
                yield Derivative(
                    **case, contender=contender, backend=backend if contender == "tim" else "eager",
                    derivative=kind, dtype=name_of(dtype), error=error, **cost,
                )  # fmt: skip
                if error > DERIVATIVE * errors["eager"] + FLOOR:
                    wrong.append(f"{contender} {kind} {name_of(dtype)}: {errors}")
    if wrong:
        raise WrongAnswer("; ".join(wrong))


def attention_rows(device: str) -> Iterator[Row]:
    """Each contender at each shape in bfloat16; its tangent's error is that of the first sample."""
    wrong = []
    for name, shape in ATTENTION.items():
        inputs = _attention_inputs(shape, torch.bfloat16, device)
        sample = [x[:1] for x in inputs]
        exact = _tangent(_materialised, [x.double() for x in sample])
        bound = DERIVATIVE * _error(_tangent(_materialised, sample), exact) + FLOOR
        for contender, call in _attention_calls().items():
            case = f"{contender}, {name}"
            if isinstance(call, str):
                yield LeftOut(case, call)
                continue
            error = None
            try:
                with side_stream(device):
                    if contender != PLAIN:
                        error = _error(call(*sample), exact)
                    sets = copies(inputs, sets_needed(2 * storage_bytes(inputs), device))
                    _, cost = _cost(*[lambda s=s: call(*s) for s in sets], device=device)  # noqa: B023
            except Exception as refusal:  # of whatever kind somebody else's kernel raises
                if contender == "tim":
                    raise
                yield LeftOut(case, f"{refusal}"[:500])
                continue
            yield Derivative(
                what="attention", contender=contender, shape=name, sizes=list(shape),
                error=error, **cost,
            )  # fmt: skip
            if contender == "tim" and error > bound:
                wrong.append(f"{case}: {error:.2e} > {bound:.2e}")
    if wrong:
        raise WrongAnswer("; ".join(wrong))


def _attention_inputs(shape: Sequence[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v as views of one packed tensor, as the models have them, and tangents likewise."""
    batch, tokens, heads, head_dim = shape
    g = torch.Generator(device).manual_seed(0)
    packed = torch.randn(2, batch, tokens, 3, heads, head_dim, generator=g, device=device)
    return [x for half in packed.to(dtype) for x in half.unbind(2)]


def _attention_calls() -> dict[str, Callable | str]:
    """By contender, what gives the tangent of q, k, v, tq, tk, tv; or why it can not."""

    def tangent(function: Callable) -> Callable:
        return lambda *inputs: _tangent(function, inputs)

    peer = next(peer for peer in PEERS if peer.call == ATTENTION_CALL)
    theirs = peer.kernel()
    return {
        "tim": tangent(_ours),
        "SDPA math under forward mode": tangent(_math),
        peer.name: theirs if isinstance(theirs, str) else tangent(theirs),
        PLAIN: lambda q, k, v, *_: [eager.attention(q, k, v) for _ in range(2)],
    }


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with use_backend("triton"):
        return attention(q, k, v)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return eager.attention(q, k, v)


def _materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), materialise=True).transpose(1, 2)


def _tangent(function: Callable, inputs: Sequence[Tensor]) -> Tensor:
    return torch.func.jvp(function, tuple(inputs[:3]), tuple(inputs[3:]))[1]


def _cost(*calls: Callable, device: str) -> tuple[Any, dict]:
    """What a call returns, and its FLOPs; on a GPU also milliseconds and bytes at the peak. The
    calls do the same on different inputs."""
    call = calls[0]
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        out = call()
    cost = {"flops": counter.get_total_flops()}
    if not is_cuda(device):
        return out, cost
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    return out, cost | {"peak_bytes": peak} | measure(calls, device).fields()


def attention_flops(q, k, v, tq, tk, tv, *_, **__) -> int:
    """Of `attention_jvp`, from shapes: Q·Kᵀ, dQ·Kᵀ, Q·dKᵀ and P·V, dP·V, P·dV."""
    batch, tokens, heads, head_dim = q
    has = [shape is not None for shape in (tq, tk, tv)]
    products = 2 + sum(has) + (has[0] or has[1])
    return products * 2 * batch * heads * tokens * k[1] * head_dim


FORMULAS = {  # those that PyTorch's counter does not know
    torch.ops.tim_kernels.attention_jvp: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q, k, v)
    ),
}


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a small network instead of XL blocks")
    parser.add_argument("--json", type=Path, help="where to write the rows too")
    args = parser.parse_args(argv)
    found: list[Row] = []
    try:
        for row in rows(args.device, args.quick):
            found.append(row)
    finally:
        for what, columns in Derivative.columns.items():
            if own := [r for r in found if isinstance(r, Derivative) and r.what == what]:
                print(table.text(own, columns), end="\n\n")
        for row in found:
            if isinstance(row, LeftOut):
                print(f"left out: {row.what}: {row.why}")
        if args.json:
            args.json.write_text(json.dumps([row.json() for row in found], indent=1))
