"""How a fused op is held against its definition.

The error of the fused op is bounded by the error that eager PyTorch of the same dtype makes, both
against the float64 reference: ‖fused − f64‖ ≤ FACTOR·‖eager − f64‖ + 1e-6·‖f64‖. One rounding at
the output can not be worse than several, 1.25 is for the noise of small shapes; derivatives pass
through more eager roundings of their own, which differ in order, hence 2.
"""

import os
from collections.abc import Callable, Sequence

import torch
import torch._dynamo.testing
from torch import Tensor

from tim_kernels.backend import use_backend

FORWARD, DERIVATIVE, FLOOR = 1.25, 2.0, 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = os.environ.get("TIM_KERNELS_TEST_BACKEND", "triton")
EMULATED = "TIM_KERNELS_EMULATION" in os.environ  # csrc/ on a CPU; its tangents are Triton's
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (64, 72, 96, 100, 768, 1152, 1153)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0, dtype=torch.float32, device="cpu") -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(device=device, dtype=dtype)


def _tuple(outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def run(
    function: Callable, inputs: Sequence[Tensor], dtype=None, with_tangents: bool = True
) -> dict[str, list[Tensor]]:
    """Outputs, gradients and tangents of `function` at `inputs`, cast to `dtype` if given.

    Cotangents and tangents are fixed noise, rounded to the inputs' own dtypes first so that every
    contender is asked the same question.
    """
    cast = (lambda x: x.to(dtype)) if dtype else (lambda x: x)
    leaves = [cast(x.detach()).requires_grad_() for x in inputs]
    outputs = _tuple(function(*leaves))
    cotangents = [
        cast(noise(*out.shape, seed=100 + i, device=out.device).to(inputs[0].dtype))
        for i, out in enumerate(outputs)
    ]
    cotangents = [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    result = {"outputs": [out.detach() for out in outputs], "gradients": list(gradients)}
    if not with_tangents:
        return result
    tangents = [
        cast(noise(*x.shape, seed=200 + i, device=x.device).to(x.dtype))
        for i, x in enumerate(inputs)
    ]
    primals = tuple(leaf.detach() for leaf in leaves)
    _, out_tangents = torch.func.jvp(function, primals, tuple(tangents))
    return result | {"tangents": list(_tuple(out_tangents))}


def assert_parity(fused: Callable, eager: Callable, inputs: Sequence[Tensor]) -> None:
    """Hold `fused` to its float64 reference, with the error of `eager` as the yardstick."""
    with use_backend("reference"):
        oracle = run(fused, inputs, torch.float64, not EMULATED)
        plain = run(eager, inputs, None, not EMULATED)
    with use_backend(BACKEND):
        ours = run(fused, inputs, None, not EMULATED)
    for kind, expected in oracle.items():
        factor = FORWARD if kind == "outputs" else DERIVATIVE
        for i, truth in enumerate(expected):
            error, yardstick = ((r[kind][i].double() - truth).norm() for r in (ours, plain))
            bound = factor * yardstick + FLOOR * truth.norm()
            assert ours[kind][i].shape == truth.shape, (kind, i)
            assert error <= bound, f"{kind}[{i}]: error {error:.3e} > {bound:.3e}"


def assert_same_every_run(function: Callable, inputs: Sequence[Tensor], runs: int = 2) -> None:
    """Bit-for-bit the same outputs, gradients and tangents."""
    with use_backend(BACKEND):
        first = run(function, inputs, None, not EMULATED)
        for _ in range(runs - 1):
            again = run(function, inputs, None, not EMULATED)
            for kind, tensors in first.items():
                for a, b in zip(tensors, again[kind], strict=True):
                    assert torch.equal(a, b), kind


def assert_adjoint(function: Callable, inputs: Sequence[Tensor]) -> None:
    """⟨J v, w⟩ = ⟨v, Jᵀ w⟩ on the fused route, in float32."""
    with use_backend(BACKEND):
        result = run(function, inputs)
    cotangents = [noise(*o.shape, seed=100 + i) for i, o in enumerate(result["outputs"])]
    tangents = [noise(*x.shape, seed=200 + i) for i, x in enumerate(inputs)]
    forward = [(t.cpu().double(), c) for t, c in zip(result["tangents"], cotangents, strict=True)]
    reverse = [(g.cpu().double(), t) for g, t in zip(result["gradients"], tangents, strict=True)]
    left, right = (sum(float((a * b).sum()) for a, b in pairs) for pairs in (forward, reverse))
    scale = sum(float(a.norm() * b.norm()) for a, b in forward + reverse)
    assert abs(left - right) <= 1e-6 * scale


def assert_gradcheck(function: Callable, inputs: Sequence[Tensor]) -> None:
    """float64 gradcheck of the reference, forward mode included."""
    leaves = [x.double().requires_grad_() for x in inputs]
    with use_backend("reference"):
        assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)


def assert_nonfinite_like_reference(function: Callable, inputs: Sequence[Tensor]) -> None:
    """NaN and infinity come out where, and as, they do in the reference."""
    with use_backend("reference"):
        expected = _tuple(function(*inputs))
    with use_backend(BACKEND):
        ours = _tuple(function(*inputs))
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
            outputs, expected = _tuple(compiled(*leaves)), _tuple(function(*inputs))
            for a, b in zip(outputs, expected, strict=True):
                assert torch.equal(a, b)
            sum(o.float().square().sum() for o in outputs).backward()
            assert all(leaf.grad is not None for leaf in leaves)
    assert frames.frame_count == 1, f"compiled {frames.frame_count} times"
