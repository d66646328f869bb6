"""What "auto" prefers is what the committed results say, and nothing else."""

import json

import pytest

from benchmarks.record.rows import Op, load
from benchmarks.report import fastest
from tim_kernels.dispatch import backend


def rows(op, **ms):
    return [
        Op(op=op, direction=direction, shape="c2i-xl, batch 64", contender=contender, ms=time)
        for contender, times in ms.items()
        for direction, time in zip(("forward", "backward"), times, strict=True)
    ]


def test_the_smaller_geometric_mean_wins():
    measured = [
        *rows("swiglu", triton=(1.0, 2.0), cuda=(0.9, 2.3), eager=(0.1, 0.1)),
        *rows("gated_residual", triton=(1.0, 2.0), cuda=(0.9, 2.1)),
        *rows("qk_norm_rope of q alone", triton=(1.0, 2.0), eager=(3.0, 4.0)),  # no rival
        *rows("layer_norm, no op of ours", triton=(1.0, 2.0), cuda=(2.0, 4.0)),
    ]
    assert fastest.fastest(measured) == {"swiglu": "triton", "ada_layer_norm": "cuda"}


def test_the_shipped_table_is_made_from_the_committed_results():
    assert json.loads(fastest.TABLE.read_text()) == fastest.table(load())


@pytest.mark.parametrize(
    "measured, chosen", [("triton", "triton"), ("cuda", "cuda"), (None, "cuda")]
)
def test_auto_takes_the_faster_one(monkeypatch, measured, chosen):
    monkeypatch.setattr(backend.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(backend, "FASTEST", {"sm_90": {"swiglu": measured}} if measured else {})
    monkeypatch.setattr(backend, "obstacle", lambda *_: None)
    assert backend.choose("swiglu", "cuda") == chosen
    monkeypatch.setattr(backend, "obstacle", lambda name, *_: "broken" if name == chosen else None)
    other = "cuda" if chosen == "triton" else "triton"
    assert backend.choose("swiglu", "cuda") == other
