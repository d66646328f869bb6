"""How a fused op is held against its definition.

The error of the fused op is bounded by the error that eager PyTorch of the same dtype makes, both
against the float64 reference: ‖fused − f64‖ ≤ FACTOR·‖eager − f64‖ + 1e-6·‖f64‖. One rounding at
the output can not be worse than several, 1.25 is for the noise of small shapes; derivatives pass
through more eager roundings of their own, which differ in order, hence 2.

Errors over a handful of numbers that nearly cancel say nothing: eager's may be small by luck. So
derivatives are taken in as many directions as make NUMBERS of them.
"""

import os
from collections.abc import Callable, Sequence

import torch
import torch._dynamo.testing
from torch import Tensor

from tim_kernels.dispatch.backend import use_backend

FORWARD, DERIVATIVE, FLOOR, NUMBERS = 1.25, 2.0, 1e-6, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = os.environ.get("TIM_KERNELS_TEST_BACKEND", "triton")
EMULATED = "TIM_KERNELS_EMULATION" in os.environ  # csrc/ on a CPU; its tangents are Triton's
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (64, 72, 96, 100, 768, 1152, 1153)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0, dtype=torch.float32, device="cpu") -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(device=device, dtype=dtype)


def as_tuple(outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def run(
    function: Callable,
    inputs: Sequence[Tensor],
    dtype=None,
    with_tangents: bool = True,
    numbers: int = 1,
) -> dict[str, list[Tensor]]:
    """Outputs, gradients and tangents of `function` at `inputs`, cast to `dtype` if given.

    Cotangents and tangents are fixed noise, rounded to the inputs' own dtypes first so that every
    contender is asked the same question. There are as many of them as give each gradient, and each
    tangent, `numbers` numbers or more; a leading dimension tells them apart.
    """
    cast = (lambda x: x.to(dtype)) if dtype else (lambda x: x)
    leaves = [cast(x.detach()).requires_grad_() for x in inputs]
    primals = tuple(leaf.detach() for leaf in leaves)
    outputs = as_tuple(function(*leaves))
    result = {"outputs": [out.detach() for out in outputs]}
    gradients = []
    for seed in _seeds(100, inputs, numbers):
        along = _noise_like(outputs, seed, [inputs[0].dtype] * len(outputs))
        cotangents = [cast(c).to(out.dtype) for c, out in zip(along, outputs, strict=True)]
        gradients.append(torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True))
    result["gradients"] = _stack(gradients)
    if not with_tangents:
        return result
    tangents = []
    for seed in _seeds(200, outputs, numbers):
        along = _noise_like(inputs, seed, [x.dtype for x in inputs])
        tangents.append(as_tuple(torch.func.jvp(function, primals, tuple(map(cast, along)))[1]))
    return result | {"tangents": _stack(tangents)}


def _noise_like(tensors: Sequence[Tensor], seed: int, dtypes: Sequence) -> list[Tensor]:
    return [
        noise(*x.shape, seed=seed + i, dtype=dtype, device=x.device)
        for i, (x, dtype) in enumerate(zip(tensors, dtypes, strict=True))
    ]


def _seeds(first: int, tensors: Sequence[Tensor], numbers: int) -> range:
    """One for each direction, so many that the smallest tensor yields `numbers` numbers of all; an
    empty one never does."""
    smallest = min((x.numel() for x in tensors if x.numel()), default=numbers)
    return range(first, first + 1000 * -(-numbers // smallest), 1000)


def _stack(directions: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(tensors) for tensors in zip(*directions, strict=True)]


def assert_parity(
    fused: Callable, eager: Callable, inputs: Sequence[Tensor], backend: str = BACKEND
) -> None:
    """Hold `fused` to its float64 reference, with the error of `eager` as the yardstick."""
    with use_backend("reference"):
        oracle = run(fused, inputs, torch.float64, not EMULATED, NUMBERS)
        plain = run(eager, inputs, None, not EMULATED, NUMBERS)
    with use_backend(backend):
        ours = run(fused, inputs, None, not EMULATED, NUMBERS)
    for kind, expected in oracle.items():
        factor = FORWARD if kind == "outputs" else DERIVATIVE
        for i, each in enumerate(zip(ours[kind], plain[kind], expected, strict=True)):
            assert_as_accurate(*each, factor, f"{kind}[{i}]")


def assert_as_accurate(ours: Tensor, plain: Tensor, truth: Tensor, factor: float, what: str):
    """‖ours − truth‖ ≤ factor·‖plain − truth‖ + FLOOR·‖truth‖."""
    error, yardstick = ((x.double() - truth).norm() for x in (ours, plain))
    bound = factor * yardstick + FLOOR * truth.norm()
    assert ours.shape == truth.shape, what
    assert error <= bound, f"{what}: error {error:.3e} > {bound:.3e}"


def assert_same_every_run(function: Callable, inputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Bit-for-bit the same outputs, gradients and tangents, twice; returns them."""
    with use_backend(BACKEND):
        first, again = run(function, inputs), run(function, inputs)
    for kind, tensors in first.items():
        for a, b in zip(tensors, again[kind], strict=True):
            assert torch.equal(a, b), kind
    return first


def assert_adjoint(result: dict[str, list[Tensor]], inputs: Sequence[Tensor]) -> None:
    """⟨J v, w⟩ = ⟨v, Jᵀ w⟩ of what `run` gave, in float32."""
    cotangents = [noise(*o.shape, seed=100 + i) for i, o in enumerate(result["outputs"])]
    tangents = [noise(*x.shape, seed=200 + i) for i, x in enumerate(inputs)]
    forward = _in_float64(result["tangents"], cotangents)
    reverse = _in_float64(result["gradients"], tangents)
    left, right = (sum(float((a * b).sum()) for a, b in pairs) for pairs in (forward, reverse))
    scale = sum(float(a.norm() * b.norm()) for a, b in forward + reverse)
    assert abs(left - right) <= 1e-6 * scale


def _in_float64(derivatives, weights) -> list[tuple[Tensor, Tensor]]:
    return [(d[0].cpu().double(), w) for d, w in zip(derivatives, weights, strict=True)]


def assert_gradcheck(function: Callable, inputs: Sequence[Tensor]) -> None:
    """float64 gradcheck of the reference, forward mode included."""
    leaves = [x.double().requires_grad_() for x in inputs]
    with use_backend("reference"):
        assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)


def assert_nonfinite_like_reference(function: Callable, inputs: Sequence[Tensor]) -> None:
    """NaN and infinity come out where, and as, they do in the reference."""
    with use_backend("reference"):
        expected = as_tuple(function(*inputs))
    with use_backend(BACKEND):
        ours = as_tuple(function(*inputs))
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isposinf(), b.isposinf()) and torch.equal(a.isneginf(), b.isneginf())


def assert_compiles_once(function: Callable, calls: Sequence[Sequence[Tensor]]) -> None:
    """One full graph serves every call (dynamic shapes), with eager's numbers and gradients."""
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounter()
    with use_backend(BACKEND):
        compiled = torch.compile(function, backend=frames, fullgraph=True, dynamic=True)
        for inputs in calls:
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            outputs, expected = as_tuple(compiled(*leaves)), as_tuple(function(*inputs))
            for a, b in zip(outputs, expected, strict=True):
                assert torch.equal(a, b)
            sum(o.float().square().sum() for o in outputs).backward()
            assert all(leaf.grad is not None for leaf in leaves)
    assert frames.frame_count == 1, f"compiled {frames.frame_count} times"
