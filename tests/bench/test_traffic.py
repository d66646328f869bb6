"""The counting rule by hand, and the fused model against its targets."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.clock.machine import Limits
from benchmarks.static import traffic
from benchmarks.static.counting import ATTENTION, GEMM, REST, Work, count, total
from benchmarks.static.traffic import BUDGETS, GPUS
from tim_kernels import ada_layer_norm, gated_residual_ada_layer_norm, use_backend
from tim_kernels.linear import choice

H100 = GPUS["H100"]
PAGE = Path(__file__).parents[2] / "docs/fp8.md"


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


X, Y, ROW = meta(4, 6), meta(4, 6), meta(6)  # 96, 96 and 24 bytes


@pytest.mark.parametrize(
    "operation, expected",
    [
        (lambda: X + Y, 96 + 96 + 96),
        (lambda: X + X, 96 + 96),
        (lambda: X + ROW, 96 + 24 + 96),
        (lambda: X + ROW.expand(4, 6), 96 + 24 + 96),
        (lambda: X[:, ::2] + 1, 48 + 48),
        (lambda: X.bfloat16(), 96 + 48),
        (lambda: F.layer_norm(X, (6,)), 96 + 96 + 2 * 16),  # mean and rstd of four rows
        (lambda: X.sum(0), 96 + 24),
        (lambda: X.add_(Y), 96 + 96 + 96),
        (lambda: X.copy_(Y), 96 + 96),
        (lambda: torch.add(X, ROW, out=Y), 96 + 24 + 96),
        (lambda: torch.zeros_like(X), 96),
        (lambda: torch.cat((X, Y)), 96 + 96 + 192),
        (lambda: X.mT.contiguous(), 96 + 96),
    ],
)
def test_one_launch_reads_and_writes_each_element_once(operation, expected):
    (work,) = count(operation)
    assert (work.category, work.bytes, work.flops) == (REST, expected, 0)


@pytest.mark.parametrize(
    "operation",
    [
        lambda: X.view(6, 4).unsqueeze(0).transpose(1, 2)[..., 1:].expand(3, 4, 5),
        lambda: X.unbind(0) + X.chunk(2),
        lambda: (torch.empty_like(X), X.new_empty(3), X.detach()),
        lambda: X.contiguous().reshape(2, 12),
        lambda: meta(0, 6) + 1,
    ],
)
def test_views_and_empties_are_free(operation):
    assert count(operation) == []


def test_matrix_products():
    W, b = meta(5, 6), meta(5)
    (work,) = count(lambda: F.linear(X[None], W, b))  # (1, 4, 6) → (1, 4, 5)
    assert work.category == GEMM
    assert work.bytes == 96 + 120 + 20 + 80
    assert work.flops == 2 * 4 * 6 * 5


@pytest.mark.parametrize("M", [8, 3])
def test_attention_is_one_kernel(M):
    q, k = meta(2, 4, 8, 16, dtype=torch.bfloat16), meta(2, 4, M, 16, dtype=torch.bfloat16)
    (work,) = count(F.scaled_dot_product_attention, q, k, k)
    assert work.category == ATTENTION
    assert work.flops == 2 * (2 * 2 * 4 * 8 * M * 16)
    statistics = 2 * 4 * 8 * 4
    assert 0 <= work.bytes - 2 * (2 * q.numel() + k.numel()) - statistics < 64  # and a seed


def test_backward_is_counted():
    x = meta(4, 6).requires_grad_()
    works = count(lambda: torch.autograd.grad(x * Y, x, X))
    assert [work.bytes for work in works] == [3 * 96, 3 * 96]


def test_silu_backward_is_one_kernel():
    x = meta(4, 6).requires_grad_()
    assert [w.name for w in count(lambda: torch.autograd.grad(F.silu(x), x, X))][1:] == [
        "silu_backward"
    ]


def test_a_fused_op_counts_what_its_launcher_does():
    B, N, C = 2, 3, 32
    x, shift, scale = (meta(*shape).requires_grad_() for shape in ((B, N, C), (B, C), (B, C)))
    with use_backend("triton"):
        forward, *rest = count(
            lambda: torch.autograd.grad(
                ada_layer_norm(x, shift, scale), (x, shift, scale), meta(B, N, C)
            )
        )
    assert forward.name == "ada_layer_norm.forward"
    assert forward.bytes == 4 * C * (2 * B * N + 2 * B)
    backward, reduction, *rest = rest
    partial = 4 * B * C * 4  # one tile a sample, room for four rows
    assert backward.name == "ada_layer_norm.backward"
    assert backward.bytes == 4 * C * (3 * B * N + B) + partial
    assert (reduction.name, reduction.bytes) == ("sum", 2 * partial)
    assert rest == []


def test_what_a_launcher_copies_is_counted():
    x, row = meta(2, 8, 16).mT, meta(2, 8)
    with use_backend("triton"):
        names = [w.name for w in count(gated_residual_ada_layer_norm, x, x, row, row, row)]
    assert names == ["clone", "clone", "ada_layer_norm.forward"]


def test_roofline_takes_the_slower_of_bytes_and_flops():
    limits = Limits(bandwidth=10.0, flops=100.0)
    works = [Work("a", REST, 20), Work("b", GEMM, 20, 500)]
    assert total(works, limits) == (2, 40, 500, 2.0 + 5.0)


@pytest.mark.parametrize("name", BUDGETS)
def test_the_fused_model_meets_its_targets(name):
    budget = BUDGETS[name]
    rest = traffic.block_totals(budget, "fused", "inference", H100)[REST]
    launches, kilobytes = budget.target
    assert rest.launches <= launches
    assert budget.floor[1] <= rest.bytes / budget.tokens / 1e3 <= kilobytes


@pytest.mark.parametrize("mode", traffic.CONTENDERS)
def test_products_that_end_in_what_follows_move_less(mode, monkeypatch):
    """In all: what leaves the rest and what products are charged for."""

    def moved() -> float:
        traffic.count_model.cache_clear()
        parts = traffic.block_totals(BUDGETS["c2i-xl"], "fused", mode, H100)
        return sum(part.bytes for part in parts.values()) / BUDGETS["c2i-xl"].tokens / 1e3

    before = moved()
    monkeypatch.setattr(choice, "_process", "quack")
    saved = before - moved()
    traffic.count_model.cache_clear()
    C, H = 1152 * 2 / 1e3, 3072 * 2 / 1e3  # KB a token
    # SwiGLU's inputs, written and read again, the tokens that fc1 reads twice, and both branches;
    # with gradients its inputs read again, the gradient of its output, written and read, the tokens
    # read twice each way, and the two gradients of them that are added
    expected = 4 * H + 3 * C if mode == "inference" else 4 * H + 6 * C
    assert saved == pytest.approx(expected, rel=0.03)


LAUNCHES = {"time_pair_embedding": 7, "transition_loss": 2}  # of every other op: one
ROOM = {"time_pair_embedding": 1.0, "transition_loss": 1.1, "attention": 1.0}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_fused_op_launches_once_and_moves_each_tensor_once(name):
    """Half of what eager moves or less, where there is more than a GEMM or a read to it."""
    for op, by_contender in traffic.count_ops(BUDGETS[name]).items():
        fused = total(by_contender["fused"], H100)
        assert fused.launches == LAUNCHES.get(op, 1), op
        if "eager" in by_contender:
            eager = total(by_contender["eager"], H100)
            assert fused.bytes <= eager.bytes * ROOM.get(op, 0.62), (op, fused.bytes, eager.bytes)


@pytest.mark.parametrize("name", BUDGETS)
def test_fp8_moves_no_more_and_multiplies_at_twice_the_rate(name):
    """Tokens are made FP8 in passes that there are anyway, and one behind each attention."""
    plain, fp8 = (
        traffic.block_totals(BUDGETS[name], contender, "inference", H100)
        for contender in ("fused", "FP8")
    )
    assert fp8[REST].bytes < 1.01 * plain[REST].bytes
    attentions = plain[ATTENTION].launches
    assert fp8[REST].launches == plain[REST].launches + attentions + 1  # of qkv_d's row of values
    assert fp8[GEMM].flops == plain[GEMM].flops
    assert fp8[GEMM].bytes < 0.85 * plain[GEMM].bytes
    assert fp8[GEMM].seconds < 0.55 * plain[GEMM].seconds


def test_the_page_of_fp8_has_the_bytes_that_are_counted():
    rows = re.findall(r"^\| .*(?:bfloat16|FP8) \| (.*) \| (.*) \| (.*) \|$", PAGE.read_text(), re.M)
    found = []
    for budget in BUDGETS.values():
        for contender in ("fused", "FP8"):
            parts = traffic.block_totals(budget, contender, "inference", H100)
            kilobytes = [parts[of].bytes / budget.tokens / 1e3 for of in (REST, GEMM)]
            block = 1e6 * sum(part.seconds for part in parts.values())
            found.append((*(f"{each:.1f}" for each in kilobytes), f"{block:,.0f}"))
    assert rows[: len(found)] == found


def test_numbers_of_one_s_own(monkeypatch, capsys):
    monkeypatch.setattr(traffic, "print_model", lambda name, budget, limits: print(name, limits))
    options = ["--bandwidth", "3.0", "--tflops", "800"]
    traffic.main(["--model", "t2i-xl", *options])
    text = capsys.readouterr().out
    assert "Your numbers: 3.00 TB/s, 800 dense" in text
    assert str(Limits(3.0e12, 8.0e14)) in text


def test_report(monkeypatch, capsys):
    real = traffic.count_model
    monkeypatch.setattr(traffic, "count_model", lambda *args: real(*args[:3], *args[3:] or (2,)))
    traffic.main(["--model", "c2i-xl", "--gpu", "H200", "--ops"])
    text = capsys.readouterr().out
    assert "H200 by its datasheet" in text and "t2i-xl" not in text
    for word in ("eager", "fused", "target", "floor", "swiglu.backward", "transition_loss"):
        assert word in text
