"""Products that end in what follows them, as quack-kernels compiles them for Hopper: registers,
spills, tiles; and the functions of their sums, in PyTorch. The gate runs them on a GPU."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from benchmarks.compare import networks, products
from benchmarks.compare.comparison import WrongAnswer
from benchmarks.gate import parts, stages
from benchmarks.record.rows import EAGER, QUACK
from tests.kernels.parity import noise
from tim_kernels.launch.plans import Plans
from tim_kernels.linear import choice, op, reference

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


def test_whatever_lies_askew_is_copied(quack, monkeypatch):
    """Tensors of a buffer that they share, such as a parameter's bias or slices of offsets."""
    given = []
    monkeypatch.setattr(
        quack.gated_residual, "gemm",
        lambda *args, epi_args, cu_seqlens_m, **_: given.extend(
            (*args, *epi_args.values(), cu_seqlens_m)
        ),
    )  # fmt: skip

    def askew(*shape, dtype=torch.bfloat16):
        flat = torch.arange(1 + torch.Size(shape).numel()).to(dtype)
        return flat[1:].view(shape)

    x, row, gate = askew(6, 8), askew(1, 8, dtype=torch.float32), askew(2, 8)
    offsets = askew(3, dtype=torch.int32)
    quack.linear_gated_residual(x, askew(8, 8), row, x, gate, offsets, 0)
    assert len(given) == 7 and all(y.data_ptr() % 16 == 0 for y in given)
    for kept, came in zip(given[4:], (row.expand(2, -1), gate, offsets), strict=True):
        assert torch.equal(kept, came)


def test_plans_do_not_pile_up(quack, monkeypatch):
    """Packed tokens, of as many numbers as there are steps."""
    calls = []
    epilogue = types.SimpleNamespace(_plan_cache={}, gemm=lambda *args: calls.append(args))
    monkeypatch.setattr(quack, "PLANS", 2)
    for T in range(5):
        quack._multiply(epilogue, T)
        epilogue._plan_cache[T] = None
        assert len(epilogue._plan_cache) <= 2
    assert len(calls) == 5 and isinstance(quack.gated._plan_cache, dict)


def test_launchers_are_those_of_the_operators(quack):
    """By their names and what they take."""
    for operator in (op.swiglu_op, op.swiglu_backward_op, op.residual_op):
        taken = operator.schema.partition("(")[2].partition(")")[0].count(",") + 1
        assert getattr(quack, operator.name).__code__.co_argcount == taken


def test_every_way_is_compared_and_timed(monkeypatch):
    """The gate's stage: references stand for what a GPU runs."""
    rows = list(products.rows("cpu", dry_run=True))
    assert [row.contender for row in rows] == [EAGER, products.OURS, QUACK] * 6
    assert {row.direction for row in rows} == {"forward", "forward + backward"}
    assert all(row.ms > 0 and row.tflop_per_s > 0 for row in rows)


@pytest.fixture
def fresh(monkeypatch):
    """Operators without plans, which keep what they launch."""
    for operator in (op.swiglu_op, op.residual_op):
        for plans in ("plans", "calls"):
            monkeypatch.setattr(operator, plans, Plans())


def test_what_is_wrong_is_not_timed(monkeypatch, fresh):
    monkeypatch.setattr(op.swiglu_op, "own", lambda *args: [x * 1.02 for x in op._swiglu(*args)])
    rows = []
    with pytest.raises(WrongAnswer, match="linear, swiglu, result 0: error .* > ") as error:
        for row in products.rows("cpu", dry_run=True):
            rows.append(row)
    assert "mlp, result" in str(error.value)
    assert {row.op for row in rows}.isdisjoint({"linear, swiglu", "mlp"}) and len(rows) == 12


def test_what_differs_between_runs_is_wrong(monkeypatch, fresh):
    signs = iter([1, -1] * 9)
    flipped = lambda *args: op._residual(*args) * next(signs)  # noqa: E731
    monkeypatch.setattr(op.residual_op, "own", flipped)
    with pytest.raises(WrongAnswer, match="proj, .*: another result at a second run"):
        list(products.rows("cpu", dry_run=True))


def test_left_out_by_name_elsewhere(monkeypatch):
    monkeypatch.setattr(choice, "obstacle", lambda name: "no Hopper")
    monkeypatch.setattr(products, "is_cuda", lambda device: True)
    (row,) = products.rows("cuda")
    assert (row.what, row.why) == ("linear layers by quack", "no Hopper")


def test_the_gate_has_it(tmp_path):
    path = tmp_path / "rows"
    stages.products(stages.Run("products", path, seconds=60, dry_run=True))
    assert {json.loads(line)["kind"] for line in path.read_text().splitlines()} == {"op"}
    assert "products" in {stage.name for stage in parts.ops_part(dry_run=True)}


@pytest.mark.parametrize("can", [True, False])
def test_networks_are_compared_where_it_can_run(monkeypatch, can):
    from benchmarks.cases.tasks import FORWARD_TASK

    monkeypatch.setattr(choice, "obstacle", lambda name: None if can else "no Hopper")
    here, left_out = networks.contenders(FORWARD_TASK, "cpu")
    (contender,) = [c for c in here if QUACK in c.name] or [None]
    assert (contender is not None) is can and (QUACK in left_out) is not can
    if can:
        with contender.active():
            assert choice.chosen() == "quack"
        assert choice.chosen() == "torch"
