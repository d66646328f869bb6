"""Whole models: a forward, sampling with guidance, a training step; contenders side by side."""

import functools

import pytest

from . import models, ops, tasks
from .conftest import DEVICE, LEFT_OUT
from .shapes import MODELS, SMALL_MODELS

TASKS = (tasks.FORWARD_TASK, *tasks.SAMPLING, *tasks.TRAINING)


def pytest_generate_tests(metafunc):
    pairs = []
    for name, model in (SMALL_MODELS if DEVICE == "cpu" else MODELS).items():
        for batch in model.batches:
            for task in TASKS + (tasks.GRAPH_TASK,) * (DEVICE == "cuda"):
                here, left_out = models.contenders(task, DEVICE)
                LEFT_OUT.update(left_out)
                case = tasks.Case(name, model, batch, task)
                pairs += [(case, contender.name) for contender in here]
    ids = [f"{case.title}: {name}".replace(", ", "-") for case, name in pairs]
    metafunc.parametrize("case, name", pairs, ids=ids)


@functools.lru_cache(maxsize=1)
def comparison(case: tasks.Case, device, limits) -> models.Comparison:
    return models.Comparison(case, device, limits)


def test_model(case, name, device, limits, benchmark):
    ours = comparison(case, device, limits)
    contender = next(c for c in ours.contenders if c.name == name)
    try:
        row = ours.row(contender, seconds=0.5 if device == "cuda" else 0.05)
    except ops.WrongAnswer:
        raise
    except Exception as error:
        if not name.startswith(models.COMPILE):
            raise
        pytest.skip(f"{name} cannot do it: {error!r}"[:300])
    benchmark.group = case.title
    benchmark.extra_info.update(row)
    with contender.active():
        benchmark.pedantic(ours.synchronised(contender), rounds=1, warmup_rounds=1)
