import math

import pytest
import torch
import torch.nn.functional as F
from contract import Contract, Problem, over
from parity import (
    BACKEND,
    DEVICE,
    DTYPES,
    assert_nonfinite_like_reference,
    assert_parity,
    noise,
    run,
)
from sweep import st
from torch.utils._python_dispatch import TorchDispatchMode

from tim_kernels.dispatch.backend import use_backend
from tim_kernels.names import CONDITIONS
from tim_kernels.time_pair_embedding import op
from tim_kernels.time_pair_embedding.op import TimeMLP, time_pair_embedding

FREQUENCIES = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)


def eager_embedder(time, w1, b1, w2, b2):
    angles = time.float()[:, None] * FREQUENCIES.to(time.device)
    x = torch.cat((angles.cos(), angles.sin()), dim=-1).to(w1.dtype)
    return F.linear(F.silu(F.linear(x, w1, b1)), w2, b2)


def eager(condition):
    def function(t, r, *weights):
        T = [eager_embedder(time, *weights[:4]) for time in (t, r)]
        D_r, D_delta = (eager_embedder(time, *weights[-4:]) for time in (r, t - r))
        delta = {
            "t-r": lambda: D_delta,
            "r": lambda: D_r,
            "t,r": lambda: T[0] + D_r,
            "t,t-r": lambda: T[0] + D_delta,
            "r,t-r": lambda: T[1] + D_delta,
            "t,r,t-r": lambda: T[0] + T[1] + D_delta,
        }[condition]()
        return T[0], delta

    return function


def fused(condition):
    def function(t, r, *weights):
        delta_mlp = TimeMLP(*weights[4:]) if len(weights) > 4 else None
        return time_pair_embedding(t, r, TimeMLP(*weights[:4]), delta_mlp, condition)

    return function


def pair(B, largest=1.0, dtype=torch.float32):
    times = largest * torch.rand(2, B, generator=torch.Generator().manual_seed(3))
    return [times.amax(0).to(DEVICE, dtype), times.amin(0).to(DEVICE, dtype)]


def weights(C, dtype=torch.float32, seed=0):
    shapes = (C, 256), (C,), (C, C), (C,)
    return [
        (noise(*shape, seed=seed + i, device=DEVICE) / math.sqrt(shape[-1])).to(dtype)
        for i, shape in enumerate(shapes)
    ]


def inputs(B=5, C=48, dtype=torch.float32, embedders=2, largest=1.0):
    return pair(B, largest) + [w for i in range(embedders) for w in weights(C, dtype, 10 * i)]


def problem(form="t,r,t-r", **sizes):
    """The forms are the conditions."""
    return Problem(fused(form), eager(form), inputs(**sizes))


class TestTimePairEmbedding(Contract):
    problem = staticmethod(problem)
    parity = [
        *over(form=[*CONDITIONS], embedders=[1, 2], dtype=[*DTYPES]),
        *over(form="t-r", B=1, C=768, dtype=[*DTYPES]),
        *over(form="t-r", B=4, C=1152, dtype=[*DTYPES]),
        *over(form="t-r", B=33, C=72, dtype=[*DTYPES]),
        *over(form="t-r", B=7, C=65, dtype=[*DTYPES]),
    ]
    empty = over(form=[*CONDITIONS], B=0, C=8)
    on_cpu = over(form=[*CONDITIONS], embedders=[1, 2], dtype=[*DTYPES])
    repeated = over(form=[*CONDITIONS], B=4)
    small = over(form=[*CONDITIONS], B=2, C=4)
    compiled = [over(embedders=n, B=[2, 5, 3], C=16) for n in (1, 2)]
    draws = dict(
        form=st.sampled_from(CONDITIONS),
        B=st.integers(2, 5),
        C=st.integers(8, 80),
        dtype=st.sampled_from(DTYPES),
        embedders=st.integers(1, 2),
        largest=st.sampled_from([1.0, 80.0, 999.0]),
    )

    def operators(self):
        t, r = pair(3)
        leaves = t.clone().requires_grad_(), r.clone().requires_grad_()
        yield op.forward_op, (*leaves, "t,t-r", torch.float32)
        yield op.forward_op, (t, r, "t,r,t-r", torch.bfloat16)
        yield op.backward_op, (noise(2, 3, 256, device=DEVICE), t, r, "t,t-r")
        yield op.forward_op.jvp, (t, r, "t,r", torch.float16, r, None)


@pytest.mark.parametrize("largest", [1e-3, 80.0, 999.0])
def test_sinusoids_of_long_times(largest):
    """Angles up to 999 radians, held to the sinusoid of the same float32 angle."""
    t, r = pair(40, largest)
    with use_backend(BACKEND):
        ours = op.forward_op(t, r, "t,r,t-r", torch.float32)
    angles = torch.stack((t, r, t - r))[..., None] * FREQUENCIES.to(DEVICE)
    expected = torch.cat((angles.double().cos(), angles.double().sin()), dim=-1)
    ulps = angles.repeat(1, 1, 2) * 2**-22  # a frequency, then an angle may round the other way
    assert ((ours - expected).abs() <= 2e-7 + ulps).all()
    assert ((ours - expected).abs() <= 2e-7).float().mean() > 0.95
    everything = inputs(12, largest=largest)
    assert_parity(fused("t,r,t-r"), eager("t,r,t-r"), everything)


def test_low_precision_times_lose_nothing_more():
    """t − r of bfloat16 times is not rounded."""
    t, r = pair(9, dtype=torch.bfloat16)
    args = inputs(9)[2:]
    with use_backend(BACKEND):
        ours = fused("t-r")(t, r, *args)
        exact = fused("t-r")(t.float(), r.float(), *args)
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


def test_strided_times_are_read_in_place():
    t, r, *w = inputs(12)
    with use_backend(BACKEND):
        ours = run(fused("t,r,t-r"), [t[::2], r[1::2], *w])
        dense = run(fused("t,r,t-r"), [t[::2].contiguous(), r[1::2].contiguous(), *w])
        ours["one r"] = fused("r,t-r")(t, r[:1].expand(12), *w)
        dense["one r"] = fused("r,t-r")(t, r[:1].repeat(12), *w)
    for kind, tensors in ours.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, dense[kind], strict=True)), kind


def test_one_embedder_given_twice_is_one():
    t, r, *w = inputs(embedders=1)
    mlp = TimeMLP(*w)
    with use_backend(BACKEND):
        one = time_pair_embedding(t, r, mlp, None, "t,r,t-r")
        for twin in (mlp, TimeMLP(*w)):
            twice = time_pair_embedding(t, r, mlp, twin, "t,r,t-r")
            assert all(torch.equal(a, b) for a, b in zip(one, twice, strict=True))


class Kernels(TorchDispatchMode):
    """Counts the calls that launch something, as far as the dispatcher tells."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_free = func.is_view or func.name() == "aten::_unsafe_view"  # of F.linear, from 2.15 on
        if not is_free and "empty" not in func.name():
            self.names.append(func.name())
        return out


@pytest.mark.parametrize(
    "condition, embedders, launches",
    [("t-r", 2, 7), ("r", 2, 7), ("t,r", 2, 8), ("t,r,t-r", 2, 9), ("t-r", 1, 4), ("t,t-r", 1, 5)],
)
def test_launches(condition, embedders, launches):
    args = [x.to("meta") for x in inputs(embedders=embedders)]
    with use_backend(BACKEND), torch.no_grad(), Kernels() as kernels:
        fused(condition)(*args)
    assert len(kernels.names) == launches, kernels.names


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity(value):
    args = inputs(4)
    args[1][2] = value
    assert_nonfinite_like_reference(fused("t,r,t-r"), args)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, r, T, D: (t, r, T, D, "t-t"), "condition must be one of"),
        (lambda t, r, T, D: (t[:, None], r, T, D), r"t must be \(B,\)"),
        (lambda t, r, T, D: (t, r.long(), T, D), "r must be"),
        (lambda t, r, T, D: (t, r[:3], T, D), r"r must be shaped as t, \(5,\)"),
        (lambda t, r, T, D: (t, r, T._replace(w1=T.w1[:, 1:]), D), r"t_mlp.w1 must be .*48, 256"),
        (lambda t, r, T, D: (t, r, T, D._replace(b2=D.b2[1:])), r"delta_mlp.b2 must be"),
        (lambda t, r, T, D: (t, r, T, TimeMLP(*(w.half() for w in D))), "must be torch.float32"),
        (lambda t, r, T, D: (t, r, TimeMLP(*(w.int() for w in T)), D), "t_mlp.w1 must be"),
        (lambda t, r, T, D: (t, r, T._replace(w2=T.w2.to("meta")), D), "t_mlp.w2 must be"),
    ],
)
def test_refusals(change, message):
    t, r, *w = inputs()
    with pytest.raises(ValueError, match=message):
        time_pair_embedding(*change(t, r, TimeMLP(*w[:4]), TimeMLP(*w[4:])))
