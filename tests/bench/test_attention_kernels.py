"""The kernels that attention could be, as the gate times them; PyTorch's own alone are here."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks.compare import attention
from benchmarks.compare.comparison import WrongAnswer
from benchmarks.gate import parts, stages
from benchmarks.record.rows import EAGER, LeftOut, Op


def test_what_is_here_is_timed_and_what_is_not_is_named():
    rows = list(attention.rows("cpu", dry_run=True))
    timed = {(row.contender, row.direction) for row in rows if isinstance(row, Op)}
    assert {(EAGER, direction) for direction in attention.DIRECTIONS} <= timed
    left_out = [row.what for row in rows if isinstance(row, LeftOut)]
    assert len(left_out) + len(timed) / 2 == len(attention.CANDIDATES)
    assert any("cuDNN" in what for what in left_out)
    assert all(row.ms > 0 and row.flops for row in rows if isinstance(row, Op))


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(attention, "CANDIDATES", (EAGER, "PyTorch's flash"))
    right = attention.kernel

    def kernel(name):
        return right(name) if name == EAGER else lambda q, k, v: right(name)(q, k, 1.01 * v)

    monkeypatch.setattr(attention, "kernel", kernel)
    found = []
    with pytest.raises(WrongAnswer, match="PyTorch's flash at small: error"):
        for row in attention.rows("cpu", dry_run=True):
            found.append(row)
    assert {row.contender for row in found} == {EAGER}


def test_a_kernel_is_asked_for_by_its_name(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "sdpa_kernel", lambda b: asked.append(b) or torch.no_grad())
    attention.kernel("cuDNN")(*torch.randn(3, 1, 4, 2, 8))
    assert asked == [SDPBackend.CUDNN_ATTENTION]


def test_the_gate_s_stage(tmp_path):
    path = tmp_path / "rows.jsonl"
    stages.attention(stages.Run("attention", path, seconds=60, dry_run=True))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"op", "left out"}
    assert "attention" in {stage.name for stage in parts.ops_part(dry_run=True)}
