"""`python -m benchmarks fp8`, in small."""

import re
from pathlib import Path

import pytest

from benchmarks.compare import fp8
from tests.golden_files import GOLDEN, relative_error
from tim.evaluation.mnist import DigitClassifier

PAGE = Path(__file__).parents[2] / "docs/fp8.md"


@pytest.mark.parametrize("name", ["model_c2i_head72", "model_t2i_tall"])
def test_the_page_has_the_errors_that_are_measured(name):
    error = fp8.golden_error(GOLDEN / f"{name}.safetensors")
    row = re.search(rf"\| {name} \| (\d+) \| (.*)% \| (.*)% \| (.*)% \|", PAGE.read_text())
    width, *percents = map(float, row.groups())
    assert error.width == width
    for found, percent in zip((error.bfloat16, error.fp8, error.apart), percents, strict=True):
        assert found == pytest.approx(percent / 100, rel=0.2)


def test_digits_are_drawn_by_each_network_from_the_same_noise(monkeypatch):
    monkeypatch.setattr(fp8, "STEPS", (1,))
    monkeypatch.setattr(fp8, "train_classifier", lambda: (DigitClassifier().eval(), 0.1))
    drawn, draw = [], fp8.draw

    def kept(*args, **options):
        images, labels = draw(*args, **options)
        drawn.append(images)
        return images, labels

    monkeypatch.setattr(fp8, "draw", kept)
    rows = list(fp8.digits(fp8.ASSET, per_class=10))
    assert [(row.steps, row.network) for row in rows] == [
        (1, "float32"), (1, "bfloat16"), (1, "FP8"),
    ]  # fmt: skip
    assert all(re.fullmatch(r"\d+\.\d ± \d+\.\d %", row.recognised) for row in rows)
    whole, *rounded = drawn
    errors = [relative_error(images, whole) for images in rounded]
    assert 0 < errors[0] < errors[1] < 0.1
