"""Products that end in what follows them, as quack-kernels compiles them for Hopper: registers,
spills, tiles; and the functions of their sums, in PyTorch. The gate runs them on a GPU."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.parity import noise
from tim_kernels.linear import op, reference

KERNELS = {
    "linear_swiglu", "linear_swiglu, kept", "linear_swiglu_backward", "linear_gated_residual",
    "linear_gated_residual, packed",
}  # fmt: skip
REGISTERS = 65536 // (3 * 128)  # of two warp groups that multiply and one that copies


def compiled(*options: str) -> list[list[str]]:
    command = [sys.executable, "-m", "benchmarks", "products", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return [line.rsplit(maxsplit=7) for line in done.stdout.splitlines()[1:]]


def check(lines: list[list[str]]) -> None:
    for kernel, _, registers, spills, product, loads, stores, narrow in lines:
        assert int(registers) <= REGISTERS and spills == "0", kernel
        assert product == ("64x192x16" if "residual" in kernel else "64x256x16"), kernel
        assert int(loads) >= 2 and int(stores) >= 6, kernel  # by tiles, of both factors
        assert int(narrow) <= 16, kernel  # rows and sums


def test_they_compile_for_hopper():
    lines = compiled("--dtype", "bfloat16")
    assert {line[0].strip() for line in lines} == KERNELS
    check(lines)


@pytest.mark.nightly
def test_every_dtype_and_width():
    for width in (384, 768, 1152, 1536):
        lines = compiled("--width", str(width))
        assert len(lines) == 2 * len(KERNELS)
        check(lines)


@pytest.fixture
def quack(monkeypatch):
    """The functions of sums, with PyTorch's SwiGLU for the library's, which needs a GPU."""
    from tim_kernels.linear import quack

    def dswiglu(gate, value, dout):
        gate, value = gate.detach().requires_grad_(), value.detach().requires_grad_()
        out = F.silu(gate) * value
        return *torch.autograd.grad(out, (gate, value), dout), out

    monkeypatch.setattr(quack, "swiglu", lambda gate, value: F.silu(gate) * value)
    monkeypatch.setattr(quack, "dswiglu", dswiglu)
    yield quack


def pair(quack, both):
    return quack.pack(both[..., ::2], both[..., 1::2])


def test_swiglu_of_sums(quack):
    x, weight, bias = noise(5, 16), noise(24, 16, seed=1), noise(24, seed=2)
    out, both = reference.linear_swiglu(x, weight, bias)
    acc, bias = pair(quack, x @ weight.t()), pair(quack, bias)
    torch.testing.assert_close(quack.gated.fn(acc, bias)["out"], out)
    kept = quack.gated_kept.fn(acc, bias)
    torch.testing.assert_close(kept["out"], out)
    torch.testing.assert_close(torch.stack(kept["D"], -1).flatten(-2), both)


def test_derivative_of_sums(quack):
    dy, weight, both = noise(5, 16), noise(16, 12, seed=1), noise(5, 24, seed=2)
    dboth, sums = reference.linear_swiglu_backward(dy, weight, both)
    found = quack.gated_backward.fn(dy @ weight, pair(quack, both))
    torch.testing.assert_close(torch.stack(found["D"], -1).flatten(-2), dboth)
    of_both = torch.stack((found["dgate"], found["dvalue"]), -1).sum(0).flatten()
    torch.testing.assert_close(of_both, sums)


def test_residual_of_sums(quack):
    x, weight, residual = noise(2, 5, 16), noise(12, 16, seed=1), noise(2, 5, 12, seed=2)
    row, gate = noise(1, 12, seed=3), noise(2, 12, seed=4)
    found = quack.gated_residual.fn(x @ weight.t(), residual, row[:, None], gate[:, None])
    expected = reference.linear_gated_residual(x, weight, row, residual, gate)
    torch.testing.assert_close(found["D"], expected)


def test_launchers_are_those_of_the_operators(quack):
    """By their names and what they take."""
    for operator in (op.swiglu_op, op.swiglu_backward_op, op.residual_op):
        taken = operator.schema.partition("(")[2].partition(")")[0].count(",") + 1
        assert getattr(quack, operator.name).__code__.co_argcount == taken
