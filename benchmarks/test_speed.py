"""Every op and whole models at the published shapes in bfloat16, contenders side by side.

The numbers are the `rows` of --benchmark-json: device time without launches, share of the measured
limit, ratios. pytest-benchmark's own clock times one run with its launches, to the end of its work.
"""

import functools

import pytest
import torch

from .cases import tasks
from .cases.ops import op_cases, shape_calls
from .cases.shapes import MODELS, PUBLISHED, SMALL, SMALL_MODELS
from .cases.tasks import NetworkCase
from .compare import networks, ops
from .compare.comparison import WrongAnswer
from .conftest import DEVICE, LEFT_OUT, ROWS

IS_CPU = DEVICE == "cpu"
TASKS = (tasks.FORWARD_TASK, *tasks.SAMPLING, *tasks.TRAINING, *(tasks.GRAPH_TASK,) * (not IS_CPU))


def of_ops():
    """(case, contenders, why others are left out)."""
    for name, shape in (SMALL if IS_CPU else PUBLISHED).items():
        calls = {call.name: call for call in shape_calls(shape, torch.bfloat16, "meta")}
        for case in op_cases({name: shape}):
            here, left_out = ops.contenders(calls[case.call], DEVICE, case.direction)
            yield case, here, {f"{name} in {case.call}": why for name, why in left_out.items()}


def of_networks():
    for name, model in (SMALL_MODELS if IS_CPU else MODELS).items():
        for batch in model.batches:
            for task in TASKS:
                yield NetworkCase(name, model, batch, task), *networks.contenders(task, DEVICE)


def pytest_generate_tests(metafunc):
    pairs = []
    for case, here, left_out in of_ops() if metafunc.function is test_op else of_networks():
        LEFT_OUT.update(left_out)
        pairs += [(case, contender.name) for contender in here]
    ids = [f"{case.title}: {name}".replace(", ", "-") for case, name in pairs]
    metafunc.parametrize("case, name", pairs, ids=ids)


@functools.lru_cache(maxsize=1)
def comparison(kind, case, limits):
    return kind(case, DEVICE, limits)


def measure(ours, name: str, seconds: float, rounds: int, benchmark) -> None:
    contender = next(c for c in ours.contenders if c.name == name)
    try:
        ROWS.append(ours.row(contender, seconds))
    except WrongAnswer:
        raise
    except Exception as error:
        if contender.is_own:
            raise
        pytest.skip(f"{name} cannot do it: {error!r}"[:300])
    benchmark.group = ours.case.title
    with contender.active():
        benchmark.pedantic(ours.to_the_end(contender), rounds=rounds, warmup_rounds=1)


def test_op(case, name, limits, benchmark):
    ours = comparison(ops.OpComparison, case, limits)
    measure(ours, name, 0.03 if IS_CPU else 0.2, 5, benchmark)


def test_model(case, name, limits, benchmark):
    ours = comparison(networks.NetworkComparison, case, limits)
    measure(ours, name, 0.05 if IS_CPU else 0.5, 1, benchmark)
