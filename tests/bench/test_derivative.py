import json
import math
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compare import derivative
from benchmarks.compare.comparison import WrongAnswer
from benchmarks.record.rows import Derivative, LeftOut


@pytest.fixture(scope="module")
def found():
    return list(derivative.rows("cpu", quick=True))


def by_case(rows):
    return {(r.contender, r.derivative, r.dtype): r for r in rows if isinstance(r, Derivative)}


def test_every_contender_derivative_and_dtype(found):
    rows = by_case(found)
    assert len(rows) == len([r for r in found if isinstance(r, Derivative)]) == 2 * 2 * 3
    assert all(math.isfinite(r.error) and r.flops > 0 for r in rows.values())


def test_what_a_cpu_can_not_say_is_named(found):
    left_out = [r for r in found if isinstance(r, LeftOut)]
    assert len(left_out) == 2 and all("CUDA" in r.why for r in left_out)
    assert all(r.ms is None for r in found if isinstance(r, Derivative))


def test_forward_mode_is_ten_times_as_exact_for_the_same_work(found):
    rows = by_case(found)
    for contender in ("eager", "tim"):
        for dtype in ("float32", "bfloat16", "float16"):
            difference, exact = (rows[contender, kind, dtype] for kind in ("dde", "jvp"))
            assert exact.error < difference.error / 10
    difference, exact = (rows["tim", kind, "bfloat16"].flops for kind in ("dde", "jvp"))
    assert exact <= 1.1 * difference


def test_wrong_answers_raise_after_their_rows():
    real = derivative.Problem.derivative

    def off(self, contender, kind):
        return real(self, contender, kind) * (1.1 if contender == "tim" else 1)

    with (
        patch.object(derivative.Problem, "derivative", off),
        patch.object(derivative, "DTYPES", [torch.float32]),
    ):
        rows = derivative.network_rows(derivative.SMALL, "cpu")
        seen = [next(rows) for _ in range(4)]
        with pytest.raises(WrongAnswer, match="tim dde float32.*tim jvp float32"):
            next(rows)
    assert len(seen) == 4


def test_attention_rows_in_the_interpreter():
    """On a GPU with their times; here that they are there, and that an error would be noticed."""
    with patch.object(derivative, "ATTENTION", {"tiny": (1, 20, 2, 72)}):
        rows = {getattr(r, "contender", r.what): r for r in derivative.attention_rows("cpu")}
        ours, math_row = rows["tim"], rows["SDPA math under forward mode"]
        assert ours.flops == math_row.flops == 6 * 2 * 2 * 20 * 20 * 72
        assert rows["two plain forwards, SDPA"].flops == 2 * 4 * 2 * 20 * 20 * 72
        assert 0 < ours.error < 0.02 and 0 < math_row.error < 0.02
        with (
            patch.object(derivative, "DERIVATIVE", 0.01),
            pytest.raises(WrongAnswer, match="tiny"),
        ):
            list(derivative.attention_rows("cpu"))


@pytest.mark.parametrize("live", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_attention_flops_are_those_of_the_composite(live):
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8)
    primals = [q, k, k.clone()]
    shapes = [x.shape if is_live else None for x, is_live in zip(primals, live, strict=True)]

    def products(q, k, v, tq, tk, tv):
        q, k, v, tq, tk, tv = (
            None if x is None else x.transpose(1, 2) for x in (q, k, v, tq, tk, tv)
        )
        p = q @ k.mT
        _ = p @ v
        scores = [a @ b.mT for a, b in ((tq, k), (q, tk)) if a is not None and b is not None]
        _ = [sum(scores) @ v] if scores else []
        _ = [] if tv is None else [p @ tv]

    tangents = [x if is_live else None for x, is_live in zip(primals, live, strict=True)]
    with FlopCounterMode(display=False) as counter:
        products(*primals, *tangents)
    expected = counter.get_total_flops()
    assert derivative.attention_flops(q.shape, k.shape, k.shape, *shapes, None) == expected


def test_report(monkeypatch, capsys, tmp_path):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(derivative, "DTYPES", [torch.float32])
    derivative.main(["--device", "cpu", "--quick", "--json", str(path)])
    text = capsys.readouterr().out
    assert "dF/dt of" in text and "blocks" in text and "left out" in text and "GFLOP" in text
    assert len(json.loads(path.read_text())) == 4 + 2
