"""Every op at the published shapes in bfloat16, its contenders side by side.

The numbers are in `extra_info`: device time without launches, GB/s, share of the measured limit,
ratios. pytest-benchmark's own clock times one call with its launches, to the end of its work.
"""

import functools

import pytest

from . import ops, timing
from .conftest import DEVICE, LEFT_OUT
from .contenders import EAGER, OWN, contenders
from .shapes import PUBLISHED, SMALL


def pytest_generate_tests(metafunc):
    pairs = []
    for case in ops.cases(SMALL if DEVICE == "cpu" else PUBLISHED):
        here, left_out = contenders(_meta_call(case), DEVICE, case.direction)
        LEFT_OUT.update({f"{name} in {case.call}": why for name, why in left_out.items()})
        pairs += [(case, contender.name) for contender in here]
    ids = [f"{case.title}: {name}".replace(", ", "-") for case, name in pairs]
    metafunc.parametrize("case, name", pairs, ids=ids)


@functools.cache
def _meta_calls(shape):
    import torch

    return {call.name: call for call in ops.shape_calls(shape, torch.bfloat16, "meta")}


def _meta_call(case: ops.Case):
    return _meta_calls(case.shape)[case.call]


@functools.lru_cache(maxsize=1)
def comparison(case: ops.Case, device, limits) -> ops.Comparison:
    return ops.Comparison(case, device, limits)


def test_op(case, name, device, limits, benchmark):
    ours = comparison(case, device, limits)
    contender = next(c for c in ours.contenders if c.name == name)
    try:
        row = ours.row(contender, seconds=0.2 if device == "cuda" else 0.03)
    except ops.WrongAnswer:
        raise
    except Exception as error:
        if name in (EAGER, *OWN):
            raise
        pytest.skip(f"{name} cannot do it: {error!r}"[:300])
    benchmark.group = case.title
    benchmark.extra_info.update(row)
    with contender.active(), timing.side_stream(device):
        call = ours.thunk(contender)
        benchmark.pedantic(lambda: (call(), timing.synchronise(device)), rounds=5, warmup_rounds=1)
