"""How exact dF/dt is and what it costs: the difference quotient (DDE) and forward mode (JVP).

    python -m benchmarks.derivative [--device cuda] [--quick] [--json rows.json]

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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tests.eager import EagerTiM, attend, randomise
from tests.kernels.parity import DERIVATIVE, FLOOR
from tim_kernels import attention, use_backend

from .machine import exact_float32
from .peers import PEERS
from .published import EPSILON, mix
from .shapes import Model
from .timing import copies, is_cuda, measure, sets_needed, side_stream, storage_bytes

DTYPES = torch.bfloat16, torch.float32, torch.float16  # the one that is trained in first
XL = Model("xl-256", (16, 16), (4, 32, 32), 0, (8,), depth=8)
XL_ON_CPU = Model("xl-256", (8, 8), (4, 16, 16), 0, (2,), depth=2)
SMALL = Model("mnist", (7, 7), (1, 28, 28), 0, (2,), depth=2)
ATTENTION = {  # (batch, tokens, heads, head_dim)
    "B, 256 tokens": (64, 256, 12, 64),
    "XL, 256 tokens": (64, 256, 16, 72),
    "XL, 1024 tokens": (8, 1024, 16, 72),
    "XL, 1000 tokens": (8, 1000, 16, 72),
    "XL, 4096 tokens": (2, 4096, 16, 72),
}
PEER = "jvp_flash_attention"


class Wrong(AssertionError):
    """Our answer is off by more than it may; what follows would be a speed without a meaning."""


def rows(device: str, quick: bool = False) -> Iterator[dict]:
    """One row for each measurement; of kind "left out", with the reason, for each that is not made.

    `quick` is a network small enough for any CPU.

    Raises:
        Wrong: after the rows that say so.
    """
    model = SMALL if quick else XL if is_cuda(device) else XL_ON_CPU
    if importlib.util.find_spec("diffusers") is None:
        yield {"kind": "left out", "what": "dF/dt of a network", "why": "diffusers is missing"}
    else:
        with exact_float32():
            yield from network_rows(model, device)
    if is_cuda(device):
        yield from attention_rows(device)
        return
    for what in ("time and memory of dF/dt", "the tangent of attention in Triton"):
        yield {"kind": "left out", "what": what, "why": f"it needs a CUDA device, not {device}"}


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
            return self._published(self.eager, kind, self.x.dtype)
        from tim.objective import TransitionObjective
        from tim.transports import make

        objective = TransitionObjective(make("OT_FM"), derivative_type=kind)
        return objective.derivative(self.ours, self.x, self.z, self.y, self.t, self.r)

    def exact(self) -> Tensor:
        """In float64, on the rounded weights."""
        self.eager.double()
        try:
            return self._published(self.eager, "jvp", torch.float64)
        finally:
            self.eager.to(next(self.ours.parameters()).dtype)

    @torch.no_grad()
    def _published(self, network: nn.Module, kind: str, dtype: torch.dtype) -> Tensor:
        x, z, t, r = (v.to(dtype) for v in (self.x, self.z, self.t, self.r))
        own = next(network.parameters()).dtype

        def at(t: Tensor) -> Tensor:
            return network(mix(x, z, t).to(own), t, r, self.y).to(dtype)

        if kind == "dde":
            return (at(t + EPSILON) - at(t - EPSILON)) / (2 * EPSILON)

        def trajectory(x_t: Tensor, t: Tensor) -> Tensor:
            return network(x_t.to(own), t, r, self.y, jvp=True)

        return torch.func.jvp(trajectory, (mix(x, z, t), t), (z - x, torch.ones_like(t)))[1]


def network_rows(model: Model, device: str) -> Iterator[dict]:
    backend = "triton" if is_cuda(device) else "reference"
    case = {
        "what": "dF/dt", "network": model.preset, "depth": model.depth, "tokens": model.tokens,
        "batch": model.batches[0],
    }  # fmt: skip
    wrong = []
    for dtype in DTYPES:
        problem = Problem(model, dtype, device)
        exact = problem.exact()
        for kind in ("dde", "jvp"):
            eager = None
            for contender in ("eager", "tim"):
                with use_backend(backend), side_stream(device):
                    cost = _cost(lambda: problem.derivative(contender, kind), device)  # noqa: B023
                out = cost.pop("out")
                error = _error(out, exact)
                eager = error if eager is None else eager
                row = case | {
                    "contender": contender, "backend": backend if contender == "tim" else "eager",
                    "derivative": kind, "dtype": _name(dtype), "error": error,
                }  # fmt: skip
                yield row | cost
                if error > DERIVATIVE * eager + FLOOR:
                    wrong.append(
                        f"{contender} {kind} {_name(dtype)}: {error:.2e}, eager {eager:.2e}"
                    )
    if wrong:
        raise Wrong("; ".join(wrong))


class Attention(NamedTuple):
    """A contender on (B, N, heads, head_dim); `count` forwards without tangents if not None."""

    name: str
    function: Callable
    count: int | None = None


def attention_rows(device: str) -> Iterator[dict]:
    """Each contender at each shape in bfloat16; its tangent's error is that of the first sample."""
    wrong = []
    for name, shape in ATTENTION.items():
        inputs = _attention_inputs(shape, torch.bfloat16, device)
        sample = [x[:1] for x in inputs]
        exact = _tangent(_materialised, [x.double() for x in sample])
        bound = DERIVATIVE * _error(_tangent(_materialised, sample), exact) + FLOOR
        for contender in _attention_contenders(shape):
            case = f"{contender.name}, {name}"
            if isinstance(contender.function, str):
                yield {"kind": "left out", "what": case, "why": contender.function}
                continue
            row = {
                "what": "attention", "contender": contender.name, "shape": name,
                "sizes": list(shape), "dtype": "bfloat16",
            }  # fmt: skip
            try:
                with side_stream(device):
                    if contender.count is None:
                        row["error"] = _error(_tangent(contender.function, sample), exact)
                    row |= _cost_of_attention(contender, inputs, device)
            except Exception as error:  # of whatever kind somebody else's kernel raises
                if contender.name == "tim":
                    raise
                yield {"kind": "left out", "what": case, "why": f"{error}"[:500]}
                continue
            yield row
            if contender.name == "tim" and row["error"] > bound:
                wrong.append(f"{case}: {row['error']:.2e} > {bound:.2e}")
    if wrong:
        raise Wrong("; ".join(wrong))


def _attention_inputs(shape: Sequence[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v as views of one packed tensor, as the models have them, and tangents likewise."""
    batch, tokens, heads, head_dim = shape
    g = torch.Generator(device).manual_seed(0)
    packed = torch.randn(2, batch, tokens, 3, heads, head_dim, generator=g, device=device)
    return [x for half in packed.to(dtype) for x in half.unbind(2)]


def _attention_contenders(shape: Sequence[int]) -> Iterator[Attention]:
    yield Attention("tim", _ours)
    yield Attention("SDPA math under forward mode", _math)
    peer = next(peer for peer in PEERS if peer.name == PEER)
    if importlib.util.find_spec(peer.package) is None:
        yield Attention(PEER, f"{peer.package} is not installed")
    else:
        try:
            yield Attention(PEER, peer.load())
        except Exception as error:  # another version than the one the loader was written for
            yield Attention(PEER, f"{peer.package} is there but does not fit: {error!r}")
    yield Attention("two plain forwards, SDPA", _plain, 2)


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with use_backend("triton"):
        return attention(q, k, v)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return _plain(q, k, v)


def _materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), materialise=True).transpose(1, 2)


def _tangent(function: Callable, inputs: Sequence[Tensor]) -> Tensor:
    return torch.func.jvp(function, tuple(inputs[:3]), tuple(inputs[3:]))[1]


def _cost_of_attention(contender: Attention, inputs: list[Tensor], device: str) -> dict:
    def run(*inputs: Tensor):
        if contender.count is None:
            return _tangent(contender.function, inputs)
        return [contender.function(*inputs[:3]) for _ in range(contender.count)]

    sets = copies(inputs, sets_needed(2 * storage_bytes(inputs), device))
    cost = _cost(lambda: run(*inputs), device, [lambda s=s: run(*s) for s in sets])
    return {k: v for k, v in cost.items() if k != "out"}


def _cost(call: Callable, device: str, thunks: Sequence[Callable] = ()) -> dict:
    """The result of a call and its FLOPs; on a GPU also milliseconds and bytes at the peak."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        out = call()
    cost = {"out": out, "flops": counter.get_total_flops()}
    if not is_cuda(device):
        return cost
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    timing = measure(thunks or [call], device)
    return cost | {
        "peak_bytes": peak, "ms": timing.ms, "ms_10": timing.low, "ms_90": timing.high,
        "timed": f"{timing.method}, {timing.rounds} rounds",
    }  # fmt: skip


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def line(row: dict) -> str:
    """A row for people."""
    if row.get("kind") == "left out":
        return f"left out: {row['what']}: {row['why']}"
    if row["what"] == "dF/dt":
        head = f"{row['derivative']:<5}{row['dtype']:<10}{row['contender']:<7}{row['backend']:<11}"
    else:
        head = f"{row['shape']:<18}{row['contender']:<31}"
    head += f"{row['error']:>10.1e}" if "error" in row else " " * 10
    head += f"{row['flops'] / 1e9:>10.1f}"
    if "ms" in row:
        head += f"{row['ms']:>10.3f}{row['peak_bytes'] / 2**20:>10.1f}"
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a small network instead of XL blocks")
    parser.add_argument("--json", type=Path, help="where to write the rows too")
    args = parser.parse_args()
    found, title = [], None
    try:
        for row in rows(args.device, args.quick):
            found.append(row)
            kind = row.get("what") if "kind" not in row else title
            if kind != title:
                title = kind
                print(heading(row))
            print(line(row), flush=True)
    finally:
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))


def heading(row: dict) -> str:
    """What the columns of a row are."""
    cost = f"{'GFLOP':>10}" + (f"{'ms':>10}{'peak MiB':>10}" if "ms" in row else "")
    if row["what"] == "dF/dt":
        case = "\ndF/dt of {depth} blocks of {network}, {batch} × {tokens} tokens\n".format(**row)
        return f"{case}\n{'':<15}{'':<18}{'error':>10}{cost}"
    return f"\nthe tangent of attention, bfloat16\n\n{'':<49}{'error':>10}{cost}"


if __name__ == "__main__":
    main()
