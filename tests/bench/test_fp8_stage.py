"""The gate's stage of FP8; on a CPU its kernels are interpreted and its products emulated."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.cases import fp8 as fp8_cases
from benchmarks.cases import tasks
from benchmarks.cases.calls import DIRECTIONS
from benchmarks.cases.shapes import MODELS, SMALL_MODELS, Shape
from benchmarks.cases.tasks import NetworkCase
from benchmarks.clock.machine import Limits
from benchmarks.compare import fp8_stage
from benchmarks.compare.comparison import WrongAnswer
from benchmarks.compare.fp8_stage import GoldenNetwork, Kernel, Product
from benchmarks.compare.networks import FP8_ROOM, NetworkComparison, contenders
from benchmarks.gate import parts, stages
from benchmarks.record.rows import EAGER, FP8, Failure, LeftOut, read
from tests.kernels.interpreter import round_like_hardware
from tim_kernels import fp8
from tim_kernels.dispatch.backend import requested

SHAPE = Shape(2, (2, 3), (4, 4, 6), 144)
ANY = "cpu", Limits(1e9, 1e9), True


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of a dry run."""
    round_like_hardware()
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    stages.fp8(stages.Run("fp8", path, seconds=120, dry_run=True))
    return [read(json.loads(line)) for line in path.read_text().splitlines()]


def of_kind(rows, kind):
    return [row for row in rows if row.kind == kind]


def test_everything_is_compared_and_nothing_fails(rows):
    assert not of_kind(rows, "failure")
    kernels = {(row.op, row.contender) for row in of_kind(rows, "op")}
    calls = {case.call for case in fp8_stage.cases(True) if isinstance(case, Kernel)}
    assert kernels >= {(call, who) for call in calls for who in (EAGER, "triton")}
    products = {op for op, who in kernels if who == FP8}
    assert products == {op for op, who in kernels if op.startswith("linear")} and len(products) == 4
    (error,) = of_kind(rows, "fp8")
    assert 0 < error.bfloat16 < error.fp8 < 0.2


def test_the_gate_s_parts_have_the_stage():
    for part in (parts.ops_part, parts.short_part):
        (stage,) = [stage for stage in part(dry_run=False) if stage.name == "FP8"]
        assert stage.command[3] == "fp8" and stage.why_not is None


@pytest.mark.parametrize("has_it", [True, False])
def test_the_sanitizer_looks_at_the_kernels_where_there_is_fp8(monkeypatch, has_it):
    monkeypatch.setattr(fp8_cases, "has_fp8", lambda device: has_it)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    found = {call.name: call.directions for call in stages._short_calls(SHAPE, "cpu")}
    kernels = [call.name for call in fp8_cases.calls(SHAPE, torch.bfloat16, "meta")]
    assert [found.get(name) for name in kernels] == [("forward",) if has_it else None] * 4
    assert all(found[name] == DIRECTIONS for name in {*found} - {*kernels})


@pytest.mark.parametrize("brief", [False, True])
def test_published_networks_and_shapes_have_their_turn(brief):
    cases = fp8_stage.cases(dry_run=False, brief=brief)
    assert len({case.title for case in cases}) == len(cases)
    products = {(case.K, case.N) for case in cases if isinstance(case, Product)}
    assert products == {(1152, 3456), (1152, 1152), (1152, 3072), (3072, 1152)}
    golden = [case for case in cases if isinstance(case, GoldenNetwork)]
    assert len(golden) == (1 if brief else 9)
    networks = [c for c in stages.planned_networks(False, brief) if FP8 in c.only]
    assert {case.model_name for case in networks} == set(MODELS)
    assert tasks.GRAPH_TASK in {case.task for case in networks}


def old_gpu(monkeypatch):
    monkeypatch.setattr(fp8, "_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def test_older_gpus_are_refused_by_name(monkeypatch, tmp_path):
    old_gpu(monkeypatch)
    run = stages.Run("fp8", tmp_path / "rows.jsonl", seconds=60, dry_run=False)
    stages.fp8(run)
    (row,) = [read(json.loads(line)) for line in run.path.read_text().splitlines()]
    assert row == LeftOut("FP8", "sm_80 has no FP8: GPUs of sm_89 and later do")
    here, left_out = contenders(tasks.GRAPH_TASK, "cuda")
    assert left_out[FP8] == row.why and not [c for c in here if c.name.startswith(FP8)]


def test_networks_are_compared():
    """Not in training, and with an error that is FP8's."""
    assert not [c for c in contenders(tasks.TRAINING[0], "cpu")[0] if c.name.startswith(FP8)]
    ((name, model),) = SMALL_MODELS.items()
    case = NetworkCase(name, model, 2, tasks.FORWARD_TASK, (EAGER, FP8))
    comparison = NetworkComparison(case, *ANY[:2])
    _, ours = comparison.contenders
    row = comparison.row(ours, 0.01)
    assert row.contender == "FP8, reference" and row.ms > 0
    assert 2 < row.error_vs_eager < FP8_ROOM
    with pytest.raises(WrongAnswer, match="FP8, reference in forward, mnist"):
        comparison.row(replace(ours, room=1.0), 0.01)


def test_a_product_that_torch_has_not_is_named(monkeypatch):
    monkeypatch.setattr(fp8_stage, "has_scaled_mm", lambda device: False)
    case = next(case for case in fp8_stage.cases(True) if isinstance(case, Product))
    (row,) = case.rows("cuda", *ANY[1:])
    assert isinstance(row, LeftOut) and row.what == case.title


def first(kind: type):
    return next(case for case in fp8_stage.cases(True) if isinstance(case, kind))


def test_a_wrong_product_is_not_timed(monkeypatch):
    right = fp8_stage.Fp8Linear.forward
    monkeypatch.setattr(
        fp8_stage.Fp8Linear, "forward", lambda layer, x: right(layer, x) * (1 + 2 * 2.0**-8)
    )
    with pytest.raises(WrongAnswer, match="linear 144 to 432, small, batch 2, 1 tokens: error"):
        list(first(Product).rows(*ANY))


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    case = first(Kernel)
    right = case.call_on("cpu")

    def wrong(*args):
        values, scales = right.function(*args)
        return values, scales * (1.02 if requested() == "triton" else 1)

    monkeypatch.setattr(Kernel, "call_on", lambda case, device: right._replace(function=wrong))
    failures = [row for row in case.rows(*ANY) if isinstance(row, Failure)]
    assert [row.what.partition(" in ")[0] for row in failures] == ["triton"]
    assert "WrongAnswer" in failures[0].why


def test_networks_that_are_too_far_off_fail(monkeypatch):
    monkeypatch.setattr(fp8_stage, "FP8_ROOM", 1.0)
    with pytest.raises(WrongAnswer, match="model_c2i_cond_r in FP8: 1.33%, bfloat16 0.57%"):
        list(first(GoldenNetwork).rows(*ANY))
