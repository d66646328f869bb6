"""What is compared, on what inputs, and that a wrong answer gets no time."""

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import peers, tasks
from benchmarks.cases.ops import DIRECTIONS, OpCase, op_cases, shape_calls
from benchmarks.cases.shapes import MODELS, PUBLISHED, SMALL, SMALL_MODELS
from benchmarks.clock.machine import Limits
from benchmarks.clock.timing import by_turns, copies, measure, ratio, storage_bytes
from benchmarks.compare import cpu, networks, ops
from benchmarks.compare.comparison import Contender, WrongAnswer
from benchmarks.compare.networks import NetworkComparison
from benchmarks.compare.ops import OpComparison
from benchmarks.record.rows import Op, fill_ratios
from benchmarks.record.table import text
from benchmarks.static.counting import total
from tim_kernels.dispatch import backend

LIMITS = Limits(1e10, 1e11)
SHAPE = "small, batch 2"


def case(call: str, direction: str = "forward", shape: str = SHAPE) -> OpCase:
    return OpCase(shape, SMALL[shape], call, direction)


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
    for each in op_cases({shape: SMALL[shape]}):
        if each.direction == direction:
            comparison = OpComparison(each, "cpu", LIMITS)
            reference = next(c for c in comparison.contenders if c.name == "reference")
            with reference.active():
                assert comparison.check(reference) <= ops.DERIVATIVE


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_answer_gets_no_time(direction):
    comparison = OpComparison(case("swiglu", direction), "cpu", LIMITS)
    eager = comparison.contenders[0]
    row = comparison.row(eager, seconds=0.0)
    assert row.ms > 0 and row.error_vs_eager <= 1
    wrong = Contender("wrong", lambda x: 1.05 * eager.make(x))
    with pytest.raises(WrongAnswer, match="wrong in swiglu"):
        comparison.row(wrong, seconds=0.0)
    nan = Contender("nan", lambda x: eager.make(x) * float("nan"))
    with pytest.raises(WrongAnswer):
        comparison.row(nan, seconds=0.0)


def spoil(network, model):
    with torch.no_grad():
        network.blocks[1].mlp.fc2.weight.mul_(1.3)
    return network


def test_a_wrong_model_gets_no_time():
    (model,) = SMALL_MODELS.values()
    for task in (tasks.FORWARD_TASK, tasks.TRAINING[0]):
        comparison = NetworkComparison(tasks.NetworkCase("mnist", model, 4, task), "cpu", LIMITS)
        with pytest.raises(WrongAnswer, match="spoilt"):
            comparison.row(Contender("spoilt", spoil), seconds=0.0)


def test_the_row_of_an_op():
    comparison = OpComparison(case("swiglu"), "cpu", LIMITS)
    row = comparison.row(comparison.contenders[0], seconds=0.0)
    elements = 2 * 16 * 384  # two samples of 16 tokens, hidden 384
    assert row.bytes == 2 * 3 * elements  # gate and value read, the product written
    assert row.gb_per_s == pytest.approx(row.bytes / row.ms / 1e6)
    assert row.share_of_limit == pytest.approx(row.gb_per_s * 1e9 / LIMITS.bandwidth)
    assert "written" in row.counted or "writes" in row.counted
    row.vs_eager = 1.0
    assert "1.00 ×" in text([row], Op.columns)


@pytest.mark.parametrize("call", ["ada_layer_norm", "qk_norm_rope of packed qkv"])
def test_backward_counts_what_follows_the_forward(call):
    work = {d: ops.needed_work(case(call, d)) for d in DIRECTIONS}
    assert work["forward"] + work["backward"] == work["forward + backward"]
    assert total(work["tangent"], LIMITS).bytes > total(work["forward"], LIMITS).bytes


def test_contenders_say_why_they_are_not_there():
    (call,) = (c for c in shape_calls(SMALL[SHAPE], torch.bfloat16, "meta")
               if c.name == peers.TWO_TENSORS)  # fmt: skip
    here, left_out = ops.contenders(call, "cpu", "forward")
    assert [c.name for c in here] == ["eager", "reference"]
    assert set(left_out) == {"torch.compile", "triton", "cuda", "liger"}
    assert all(left_out.values())
    here, _ = ops.contenders(call, "cpu", "forward + backward", interpret=True)
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
    calls = lambda: order.append("a"), lambda: order.append("b")  # noqa: E731
    first, second = by_turns(calls, "cpu", rounds=4)
    assert len(first) == len(second) == 4
    assert order[:4] in (["b", "a", "a", "b"], ["a", "b", "b", "a"])
    assert order.count("a") == order.count("b") == 5
    assert ratio([4.0, 2.0, 9.0], [2.0, 2.0, 3.0]) == (4.0, 2.0, 2.0, 1.0, 3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turns_of_an_op(dtype):
    (row,) = cpu.turns(case("swiglu", "backward")._replace(dtype=dtype), rounds=2)
    assert (row.base, row.contender, row.rounds) == ("eager", "auto", 2)
    assert row.ratio_10 <= row.ratio <= row.ratio_90


@pytest.mark.parametrize("task", [tasks.FORWARD_TASK, tasks.TRAINING[0], tasks.SAMPLING[0]])
def test_turns_of_a_network_in_float32(task):
    """Its answers are right before there is a time, in that dtype too."""
    (model,) = SMALL_MODELS.values()
    network = tasks.NetworkCase("mnist", model, 2, task, dtype=torch.float32)
    comparison = NetworkComparison(network, "cpu", LIMITS)
    (row,) = comparison.turns([networks.PUBLISHED], networks.AUTO, rounds=1)
    assert row.contender == "tim, auto" and row.case == network.title
    spoilt = Contender("spoilt", spoil)
    with pytest.raises(WrongAnswer, match="spoilt"):
        comparison.turns([networks.PUBLISHED], spoilt, rounds=1)


def test_the_cpu_s_cases_are_every_op_and_whole_networks():
    cases = cpu.ops()
    folders = {each.call_on("meta").op for each in cases}
    assert folders == set(backend.OPS) - {"quantise_rows"}  # FP8 is for GPUs
    assert {each.direction for each in cases} == {"forward", "backward"}
    assert {each.dtype for each in cases} == {torch.float32, torch.bfloat16}
    found = {(c.model.depth, c.task.kind) for c in cpu.networks()}
    assert found >= {(4, "forward"), (12, "forward"), (4, "training"), (4, "sampling")}
    assert all(c.model.tokens == 256 for c in cpu.networks())


def test_ratios_do_not_depend_on_the_order():
    same = dict(op="o", direction="d", shape="s")
    rows = [Op(**same, contender=name, ms=ms)
            for name, ms in (("triton", 1.0), ("torch.compile", 2.0), ("eager", 4.0))]  # fmt: skip
    rows.append(replace(rows[0], shape="another"))
    fill_ratios(rows)
    assert [row.vs_eager for row in rows] == [4.0, 2.0, 1.0, None]
    assert [row.vs_compile for row in rows] == [2.0, 1.0, 0.5, None]


def test_a_task_has_its_contenders(monkeypatch):
    here, left_out = networks.contenders(tasks.TRAINING[0], "cpu")
    assert [c.name for c in here] == ["eager", "accelerate, reference", "tim, reference"]
    assert "torch.compile" in left_out
    monkeypatch.setattr(networks.importlib.util, "find_spec", lambda name: None)
    here, left_out = networks.contenders(tasks.SAMPLING[0], "cpu")
    assert [c.name for c in here] == ["eager", "accelerate, reference", "FP8, reference"]
    assert left_out["tim, reference"] == "diffusers is not installed"
