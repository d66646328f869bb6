"""Products that take up what follows them: definitions, gradients, and when they are taken. Here
their references run; what quack-kernels compiles of them is in tests/bench/test_products.py, and a
GPU's gate holds one against the other."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from parity import assert_as_accurate, noise
from torch import nn
from torch._subclasses import FakeTensorMode

import tim_kernels
from tim_kernels import BackendUnavailable, Segments, set_linear
from tim_kernels.linear import choice, op
from tim_kernels.network import layers

K, H, N = 24, 40, 16
SEGMENTS = Segments.from_lengths([3, 0, 4])


def layer(out: int, width: int, seed: int, dtype=torch.float64, has_bias: bool = True) -> op.Layer:
    weight = noise(out, width, seed=seed, dtype=dtype)
    return op.Layer(weight, noise(out, seed=seed + 50, dtype=dtype) if has_bias else None)


def plain_mlp(x, gate, value, last):
    return F.linear(F.silu(F.linear(x, *gate)) * F.linear(x, *value), *last)


@pytest.mark.parametrize("has_bias", [True, False])
def test_swiglu_of_two_layers(has_bias):
    x, gate, value = (
        noise(2, 5, K, dtype=torch.float64),
        layer(H, K, 1, has_bias=has_bias),
        layer(H, K, 2),
    )
    out = op.linear_swiglu(x, gate, value)
    torch.testing.assert_close(out, F.silu(F.linear(x, *gate)) * F.linear(x, *value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_once(dtype):
    """A sum that is not rounded before SwiGLU, and one rounding of what comes out."""
    x, *layers = noise(2, 5, K, dtype=dtype), layer(H, K, 1, dtype), layer(H, K, 2, dtype)
    wide = [op.Layer(weight.double(), bias.double()) for weight, bias in layers]
    exact = op.linear_swiglu(x.double(), *wide)
    assert_as_accurate(op.linear_swiglu(x, *layers), exact.to(dtype), exact, 1.0, dtype)


@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize("samples", [3, 1])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gated_residual(segments, samples, has_bias):
    shape = (3, 4) if segments is None else (7,)
    x, residual = (
        noise(*shape, K, dtype=torch.float64),
        noise(*shape, N, seed=1, dtype=torch.float64),
    )
    gate, bias = noise(2, samples, N, seed=2, dtype=torch.float64)
    last = layer(N, K, 3, has_bias=has_bias)
    out = op.linear_gated_residual(x, last, residual, gate, bias, segments)
    expected = tim_kernels.gated_residual(residual, F.linear(x, *last), gate, bias, segments)
    # the biases are rows of float32
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients(has_bias):
    x = noise(2, 5, K, dtype=torch.float64)
    layers = [layer(H, K, 1), layer(H, K, 2, has_bias=has_bias), layer(N, H, 3, has_bias=has_bias)]
    leaves = [
        y.requires_grad_() for y in (x, *(y for each in layers for y in each)) if y is not None
    ]
    out, expected = op.mlp(x, *layers), plain_mlp(x, *layers)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-5)
    along = noise(*out.shape, seed=9, dtype=torch.float64)
    found, wanted = (torch.autograd.grad(y, leaves, along) for y in (out, expected))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_autocast():
    """Products are bfloat16, gradients as wide as what they are of."""
    x, *layers = (
        noise(2, 5, K),
        *(layer(*sizes, torch.float32) for sizes in ((H, K, 1), (H, K, 2), (N, H, 3))),
    )
    leaves = [y.requires_grad_() for y in (x, *(y for each in layers for y in each))]
    wanted = torch.autograd.grad(plain_mlp(x, *layers).square().sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = op.mlp(x, *layers), plain_mlp(x, *layers)
        with torch.no_grad():
            assert op.linear_swiglu(x, *layers[:2]).dtype == torch.bfloat16
    assert out.dtype == plain.dtype == torch.bfloat16
    found, plain = (torch.autograd.grad(y.float().square().sum(), leaves) for y in (out, plain))
    for a, b, truth in zip(found, plain, wanted, strict=True):
        assert a.dtype == torch.float32
        assert_as_accurate(a, b, truth.double(), 2.0, "a gradient")


def test_float64_is_not_cast():
    """As PyTorch's autocast leaves it."""
    x, *layers = noise(2, 5, K, dtype=torch.float64), layer(H, K, 1), layer(H, K, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, *layers[0]).dtype == torch.float64
        assert op.linear_swiglu(x, *layers).dtype == torch.float64


def test_gradients_that_nobody_needs():
    x, layers = (
        noise(2, 5, K, dtype=torch.float64),
        [layer(H, K, 1), layer(H, K, 2), layer(N, H, 3)],
    )
    layers[1].bias.requires_grad_()
    (found,) = torch.autograd.grad(op.mlp(x, *layers).sum(), layers[1].bias)
    (wanted,) = torch.autograd.grad(plain_mlp(x, *layers).sum(), layers[1].bias)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["swiglu", "swiglu, kept", "backward", "residual", "packed"])
def test_operators(name):
    x, weight = noise(7, K, dtype=torch.bfloat16), noise(2 * H, K, seed=1, dtype=torch.bfloat16)
    back = noise(N, H, seed=2, dtype=torch.bfloat16)
    row, gate = noise(1, K, seed=3), noise(3, K, seed=4, dtype=torch.bfloat16)
    square = noise(K, K, seed=5, dtype=torch.bfloat16)
    packed = SEGMENTS.cu_seqlens, SEGMENTS.max_length
    operator, args = {
        "swiglu": (op.swiglu_op, (x, weight, noise(2 * H), False)),
        "swiglu, kept": (op.swiglu_op, (x, weight, noise(2 * H), True)),
        "backward": (op.swiglu_backward_op, (x[:, :N], back, noise(7, 2 * H, dtype=x.dtype))),
        "residual": (op.residual_op, (x[None], square, row, x[None], gate[:1], None, 0)),
        "packed": (op.residual_op, (x, square, row, x, gate, *packed)),
    }[name]
    torch.library.opcheck(operator.torch_op, args)


def test_what_would_need_a_derivative_is_refused():
    x, gate, value = noise(5, K), layer(H, K, 1, torch.float32), layer(H, K, 2, torch.float32)
    x.requires_grad_()
    with pytest.raises(NotImplementedError, match="linear_swiglu has no derivative"):
        op.linear_swiglu(x, gate, value)
    with pytest.raises(NotImplementedError, match="linear_gated_residual has no derivative"):
        op.linear_gated_residual(x[None], layer(K, K, 1, torch.float32), x[None], x[:1])
    args = x.detach(), noise(2 * H, K), noise(2 * H), False
    with pytest.raises(NotImplementedError, match="has no forward derivative"):
        torch.func.jvp(lambda x: op.swiglu_op.torch_op(x, *args[1:]), (args[0],), (args[0],))


def test_worth_from_four_times_as_many_tokens_as_channels():
    assert not op.is_worth(torch.empty(2, 47, K)) and op.is_worth(torch.empty(2, 48, K))


@pytest.mark.parametrize(
    "tokens, lengths, are_full",
    [
        (256, None, True), (241, None, True), (240, None, False), (196, None, False),
        (384, (256, 128), True), (384, (200, 184), False), (1024, (1000, 24), False),
    ],
)  # fmt: skip
def test_tiles_that_begin_with_a_sample(tokens, lengths, are_full):
    segments = None if lengths is None else Segments.from_lengths(lengths)
    x = torch.empty((2, tokens, K) if lengths is None else (tokens, K), device="meta")
    assert op.are_tiles_full(x, segments) is are_full


def test_tiles_of_lengths_that_only_the_gpu_knows():
    segments = Segments(torch.tensor([0, 256], dtype=torch.int32, device="meta"), 256, 256)
    assert not op.are_tiles_full(torch.empty(256, K, device="meta"), segments)


@pytest.fixture
def hopper(monkeypatch):
    """A machine that has everything, as far as anybody asks."""
    monkeypatch.setattr(choice, "obstacle", lambda name: None)
    monkeypatch.setattr(choice, "_process", "torch")
    yield monkeypatch


def test_taken_where_asked_for(hopper):
    x = torch.empty(2, 64, 32, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(64, 32, dtype=torch.bfloat16, device="meta")
    assert not choice.takes(x, weight)  # off
    set_linear("quack")
    assert choice.takes(x, weight)
    assert choice.takes(x.half(), weight.half())
    assert not choice.takes(x.float(), weight.float())
    assert not choice.takes(x, weight.float())
    assert not choice.takes(x, weight[:12])
    assert not choice.takes(x, torch.empty_like(weight, device="cpu"))
    assert not choice.takes(x[:0], weight)
    assert not choice.takes(torch.empty(2, 64, 32, dtype=torch.bfloat16), weight)
    with torch.autograd.forward_ad.dual_level():
        assert not choice.takes(x, weight)
    taken = []
    torch.func.vmap(lambda x: taken.append(choice.takes(x, weight)) or x)(x)
    torch.compile(lambda x: taken.append(choice.takes(x, weight)) or x, backend="eager")(x)
    assert taken == [False, False]
    set_linear("torch")
    assert not choice.takes(x, weight)


def test_taken_on_a_hopper_gpu_beside_others(hopper):
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: (9 - device.index, 0))
    set_linear("quack")
    with FakeTensorMode():
        for index, is_taken in ((0, True), (1, False)):
            x = torch.empty(64, 32, dtype=torch.bfloat16, device=f"cuda:{index}")
            assert choice.takes(x, x) is is_taken


def test_refused_by_name():
    choice.obstacle.cache_clear()  # of another test's machine
    with pytest.raises(ValueError, match="one of torch, quack; got 'cutlass'"):
        set_linear("cutlass")
    with pytest.raises(BackendUnavailable, match="cannot run: it needs"):
        set_linear("quack")
    set_linear("torch")


def test_other_gpus_and_missing_packages(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    choice.obstacle.cache_clear()
    assert "Hopper" in choice.obstacle("quack")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for name in ("quack", "quack.activation"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tim_kernels.linear.quack", raising=False)
    monkeypatch.delattr(tim_kernels.linear, "quack", raising=False)
    choice.obstacle.cache_clear()
    assert 'pip install "tim-kernels[hopper]"' in choice.obstacle("quack")
    choice.obstacle.cache_clear()


@pytest.mark.parametrize("name, code", [("quack", 0), ("cublas", 1)])
def test_environment_variable(name, code):
    script = "import tim_kernels.linear.choice as choice; print(choice._process)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True,
        env=os.environ | {"TIM_KERNELS_LINEAR": name},
    )  # fmt: skip
    assert done.returncode == code
    assert name in (done.stdout if code == 0 else done.stderr)


def test_forward_mode_goes_by_torch(hopper):
    """With tangents nothing is taken, on whatever device."""
    mlp = nn.Module()
    mlp.fc1_g, mlp.fc1_x, mlp.fc2 = (nn.Linear(a, b) for a, b in ((32, 64), (32, 64), (64, 32)))
    mlp = mlp.to("meta", torch.bfloat16)
    x = torch.empty(2, 256, 32, dtype=torch.bfloat16, device="meta")
    set_linear("quack")
    assert layers.ends_in_swiglu(mlp, x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert not layers.ends_in_swiglu(mlp, dual)
