"""What the algorithm saves without kernels, on a CPU."""

import pytest

from . import savings
from .shapes import SMALL_MODELS

(NAME,) = SMALL_MODELS


@pytest.mark.parametrize("number", range(savings.COUNT))
def test_saving(number, benchmark):
    before, after, row = savings.measured(NAME, SMALL_MODELS[NAME], 2, number, rounds=3)
    benchmark.group = row["what"]
    benchmark.extra_info.update(row)
    benchmark.pedantic(after, rounds=2, warmup_rounds=0)
