"""What is compared, on what inputs, and that a wrong answer gets no time."""

import pytest
import torch

from benchmarks import models, ops, peers, tasks
from benchmarks.contenders import Contender, contenders
from benchmarks.counting import total
from benchmarks.machine import Limits
from benchmarks.results import fill_ratios
from benchmarks.shapes import MODELS, PUBLISHED, SMALL, SMALL_MODELS
from benchmarks.timing import alternate, copies, measure, storage_bytes

LIMITS = Limits(1e10, 1e11)
SHAPE = "small, batch 2"


def case(call: str, direction: str = "forward", shape: str = SHAPE) -> ops.Case:
    return ops.Case(shape, SMALL[shape], call, direction)


def test_the_published_shapes_are_there():
    assert {s.batch for name, s in PUBLISHED.items() if name.startswith("c2i")} == {8, 64, 256}
    assert {s.batch for name, s in PUBLISHED.items() if name.startswith("t2i")} == {1, 8, 32}
    tokens = {name: shape.tokens for name, shape in PUBLISHED.items()}
    assert tokens["c2i-xl, batch 64"] == 64 * 256 and tokens["t2i-xl, batch 8"] == 8 * 1024
    assert tokens["4096 tokens"] == 4096 and tokens["16384 tokens"] == 16384
    assert len(set(PUBLISHED["packed, 8 resolutions"].grids)) == 8
    for model in (*MODELS.values(), *SMALL_MODELS.values()):
        params = model.network_params()
        side = model.latent[1] // params["patch_size"]
        assert model.grid == (side, side) and model.latent[0] == params["in_channels"]


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("direction", ["forward", "forward + backward", "tangent"])
def test_the_reference_gives_eager_s_answers(shape, direction):
    for each in ops.cases({shape: SMALL[shape]}):
        if each.direction == direction:
            comparison = ops.Comparison(each, "cpu", LIMITS)
            reference = next(c for c in comparison.contenders if c.name == "reference")
            with reference.active():
                assert comparison._check(reference) <= ops.DERIVATIVE


@pytest.mark.parametrize("direction", ops.DIRECTIONS)
def test_a_wrong_answer_gets_no_time(direction):
    comparison = ops.Comparison(case("swiglu", direction), "cpu", LIMITS)
    eager = comparison.contenders[0]
    row = comparison.row(eager, seconds=0.0)
    assert row["ms"] > 0 and row["error_vs_eager"] <= 1
    wrong = Contender("wrong", lambda x: 1.05 * eager.function(x))
    with pytest.raises(ops.WrongAnswer, match="wrong in swiglu"):
        comparison.row(wrong, seconds=0.0)
    nan = Contender("nan", lambda x: eager.function(x) * float("nan"))
    with pytest.raises(ops.WrongAnswer):
        comparison.row(nan, seconds=0.0)


def test_a_wrong_model_gets_no_time():
    (model,) = SMALL_MODELS.values()
    for task in (tasks.FORWARD_TASK, tasks.TRAINING[0]):
        comparison = models.Comparison(tasks.Case("mnist", model, 4, task), "cpu", LIMITS)

        def spoil(network, model):
            with torch.no_grad():
                network.blocks[1].mlp.fc2.weight.mul_(1.3)
            return network

        with pytest.raises(ops.WrongAnswer, match="spoilt"):
            comparison.row(tasks.Contender("spoilt", spoil), seconds=0.0)


def test_the_row_of_an_op():
    comparison = ops.Comparison(case("swiglu"), "cpu", LIMITS)
    row = comparison.row(comparison.contenders[0], seconds=0.0)
    elements = 2 * 16 * 384  # two samples of 16 tokens, hidden 384
    assert row["bytes"] == 2 * 3 * elements  # gate and value read, the product written
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
    assert row["share_of_limit"] == pytest.approx(row["gb_per_s"] * 1e9 / LIMITS.bandwidth)
    assert "written" in row["counted"] or "writes" in row["counted"]
    assert ops.summary(row | {"vs_eager": 1.0, "vs_compile": None})


@pytest.mark.parametrize("call", ["ada_layer_norm", "qk_norm_rope of packed qkv"])
def test_backward_counts_what_follows_the_forward(call):
    work = {d: ops.needed_work(case(call, d), torch.bfloat16) for d in ops.DIRECTIONS}
    assert work["forward"] + work["backward"] == work["forward + backward"]
    assert total(work["tangent"], LIMITS).bytes > total(work["forward"], LIMITS).bytes


def test_contenders_say_why_they_are_not_there():
    (call,) = (c for c in ops.shape_calls(SMALL[SHAPE], torch.bfloat16, "meta")
               if c.name == peers.TWO_TENSORS)  # fmt: skip
    here, left_out = contenders(call, "cpu", "forward")
    assert [c.name for c in here] == ["eager", "reference"]
    assert set(left_out) == {"torch.compile", "triton", "cuda", "liger"}
    assert all(left_out.values())
    here, _ = contenders(call, "cpu", "forward + backward", interpret=True)
    assert {"torch.compile", "reference"} < {c.name for c in here}


def test_copies_are_alike_and_apart():
    qkv = torch.randn(2, 3, 12)
    q, k, row = qkv[..., :4], qkv[..., 4:8], torch.randn(5)[1:]
    first, second = copies((q, k, row), 2)
    assert all(a is b for a, b in zip(first, (q, k, row), strict=True))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
        assert a.storage_offset() == b.storage_offset()
    second[0].zero_()
    assert bool(q.any())
    assert second[0].untyped_storage().data_ptr() == second[1].untyped_storage().data_ptr()
    assert storage_bytes((q, k, row)) == 4 * (72 + 5)


def test_every_set_is_called_and_the_median_counts():
    calls = []
    timing = measure([lambda i=i: calls.append(i) for i in range(3)], "cpu", seconds=0.0)
    assert (timing.method, timing.sets) == ("clock", 3)
    assert calls == [0, 1, 2] * (2 + timing.rounds)
    assert timing.low <= timing.ms <= timing.high


def test_two_by_turns():
    order = []
    pair = alternate(lambda: order.append("a"), lambda: order.append("b"), "cpu", rounds=4)
    assert pair.rounds == 4 and order[:4] in (["b", "a", "a", "b"], ["a", "b", "b", "a"])
    assert order.count("a") == order.count("b") == 5


def test_ratios_do_not_depend_on_the_order():
    same = dict(kind="op", op="o", direction="d", shape="s")
    rows = [same | dict(contender=name, ms=ms)
            for name, ms in (("triton", 1.0), ("torch.compile", 2.0), ("eager", 4.0))]  # fmt: skip
    rows.append(rows[0] | dict(shape="another"))
    fill_ratios(rows)
    assert [row["vs_eager"] for row in rows] == [4.0, 2.0, 1.0, None]
    assert [row["vs_compile"] for row in rows] == [2.0, 1.0, 0.5, None]


def test_a_task_has_its_contenders(monkeypatch):
    here, left_out = models.contenders(tasks.TRAINING[0], "cpu")
    assert [c.name for c in here] == ["eager", "accelerate, reference", "tim, reference"]
    assert "torch.compile" in left_out
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    here, left_out = models.contenders(tasks.SAMPLING[0], "cpu")
    assert [c.name for c in here] == ["eager", "accelerate, reference"]
    assert left_out["tim, reference"] == "diffusers is not installed"
