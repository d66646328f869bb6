"""`python -m benchmarks training`: counted, not guessed."""

from pathlib import Path

import pytest
import torch

from benchmarks.cases.shapes import Model
from benchmarks.record.table import markdown
from benchmarks.static import training
from benchmarks.static.traffic import BUDGETS, GPUS, block_totals
from tim_kernels import use_backend

SMALL = Model("b-256", (8, 8), (4, 32, 32), 0, (), depth=2)


def test_memory_grows_with_the_batch_and_shrinks_by_checkpointing():
    two, four = (training.kept(SMALL, batch, False) for batch in (2, 4))
    again = training.kept(SMALL, 4, True)
    assert 1.8 * two < four < 2.05 * two
    assert again < 0.5 * four


def test_what_is_kept_is_what_autograd_keeps():
    """A layer of its own: SwiGLU keeps its input, both projections and their product."""
    from tim.models.layers import SwiGLU

    with torch.device("meta"):
        layer, x = SwiGLU(8, 32, 8).bfloat16(), torch.empty(4, 8, dtype=torch.bfloat16)
    with use_backend("triton"):
        assert training.kept_by(layer, x.requires_grad_()) == 2 * 4 * (8 + 3 * 32)


@pytest.mark.parametrize("preset", training.PRESETS)
def test_published_presets(preset):
    slow, fast = (training.need(preset, gpu, batch=8) for gpu in ("A100", "B200"))
    assert slow.parameters == fast.parameters and slow.step > 2 * fast.step
    assert slow.memory == pytest.approx(slow.state + 8 * slow.kept / 1e3)
    assert {"b-256": 136, "t2i": 873}.get(preset, 672) == pytest.approx(slow.parameters, abs=1)


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(preset, marks=() if preset == "b-256" else pytest.mark.nightly)
        for preset in training.PRESETS
    ],
)
def test_the_documentation_says_what_is_counted(preset):
    needs = [training.need(preset, gpu) for gpu in ("H100", "B200")]
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    assert all(line in page for line in markdown(needs, training.COLUMNS).splitlines())


@pytest.mark.parametrize("name, most", [("c2i-xl", 1.5), ("t2i-xl", 2.9)])
def test_kernels_sum_the_gradients_of_biases(name, most):
    """Sums of their own would read 10.3·C of bfloat16 a token again, or 12.3·C with a text."""
    by_name = block_totals(BUDGETS[name], "fused", "training", GPUS["H100"], by="name")
    assert by_name["sum"].bytes / BUDGETS[name].tokens / 1e3 < most
