"""What an engine saves, as counted, and what docs/sampling.md says of it."""

from pathlib import Path

import pytest

from benchmarks.cases.shapes import MODELS
from benchmarks.record.table import markdown
from benchmarks.static import sampling, traffic
from benchmarks.static.sampling import STEPS, columns, costs
from benchmarks.static.traffic import GPUS

PAGE = (Path(__file__).parents[2] / "docs/sampling.md").read_text()
CASES = [
    pytest.param(name, batch, marks=() if (name, batch) == ("c2i-xl", 1) else pytest.mark.nightly)
    for name, batches in sampling.BATCHES.items()
    for batch in batches
]


@pytest.mark.parametrize("name, batch", CASES)
def test_the_documentation_says_what_is_counted(name, batch):
    lines = markdown(costs(name, MODELS[name], batch, GPUS), columns(GPUS)).splitlines()
    assert all(line in PAGE for line in lines)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_launches_less_and_moves_less(name):
    before, after, once = costs(name, MODELS[name]._replace(depth=2), 1, GPUS)
    assert after.launches < 0.7 * before.launches and after.bytes < before.bytes
    assert after.flops < before.flops
    assert once.launches + after.launches < 1.2 * before.launches
    saved = STEPS * (before.bytes - after.bytes)
    assert once.bytes < saved / 3
    assert all(after.seconds[gpu] < before.seconds[gpu] for gpu in GPUS)


def test_report(monkeypatch, capsys):
    monkeypatch.setitem(traffic.MODELS, "c2i-xl", MODELS["c2i-xl"]._replace(depth=1))
    traffic.main(["--sampling", "--model", "c2i-xl"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 * len(sampling.BATCHES["c2i-xl"])
    assert "| c2i-xl | 64 | a step, engine |" in lines[6]
