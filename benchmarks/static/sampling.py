"""What a guided step of sampling costs, step by step and with an engine, counted on meta tensors.

The engine forms conditioning rows and reads text once a run. At small batches a step reads every
weight and computes little with it, so that what is not formed again is bytes saved. Launches are
those of an eager step; a captured one is one launch of the host, and as many of the GPU.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from tim.models import TiMTransformer2DModel
from tim.sampling.evaluation import Ahead, StepByStep
from tim.sampling.graphs import Graphs
from tim.sampling.steps import Options
from tim.transports import make
from tim_kernels import use_backend
from tim_kernels.network.conditioning import is_text
from tim_kernels.network.forward import read_text

from ..cases.shapes import Model
from ..clock.machine import Limits
from ..record.table import Column
from .counting import Work, count, total

STEPS, CACHE = 8, 1 << 30
BATCHES = {"c2i-xl": (1, 64), "t2i-xl": (1, 8)}


class Cost(NamedTuple):
    """Of one guided step, or of what comes before the first, of a published network in bfloat16."""

    model: str
    batch: int
    what: str
    launches: int
    bytes: int
    flops: int
    seconds: dict[str, float]  # the roofline's, by GPU


def costs(name: str, model: Model, batch: int, gpus: dict[str, Limits]) -> list[Cost]:
    """A step step by step; with an engine; and what the engine does once for `STEPS` steps."""
    with torch.device("meta"):
        network = TiMTransformer2DModel(**model.network_params()).bfloat16().eval()
        x = torch.empty(batch, *model.latent, dtype=torch.float64)
        guidance = torch.empty(batch, dtype=torch.float64)
    transport, y = make("OT_FM"), model.meta_inputs(batch, torch.bfloat16)[-1]
    args = network, transport, y, y, guidance
    steps = Options(STEPS, cfg_scale=1.5, cfg_high=1.1).steps(transport)
    plain, ahead = StepByStep(*args), Ahead(*args, steps=steps, budget=CACHE, graphs=Graphs())

    def formed() -> None:
        ahead.form(steps[0])

    def formed_and_advanced() -> None:
        ahead.form(steps[0])
        ahead.advance(x, steps[0], lambda: None)

    once = _count(formed)
    rest = _count(formed_and_advanced)[len(once) :]
    if is_text(network):
        once += _count(lambda: read_text(network, torch.cat((y, y))))
    works = {
        "a step, step by step": _count(lambda: plain.advance(x, steps[0], lambda: None)),
        "a step, engine": rest,
        f"once for {STEPS} steps, engine": once,
    }
    return [_cost(name, batch, what, work, gpus) for what, work in works.items()]


def _count(function: Callable) -> list[Work]:
    with torch.no_grad(), use_backend("triton"):
        return count(function)


def _cost(name: str, batch: int, what: str, work: list[Work], gpus: dict[str, Limits]) -> Cost:
    launches, moved, flops, _ = total(work, next(iter(gpus.values())))
    seconds = {gpu: total(work, limits).seconds for gpu, limits in gpus.items()}
    return Cost(name, batch, what, launches, moved, flops, seconds)


def columns(gpus: dict[str, Limits]) -> list[Column]:
    return [
        Column("network", "model"), Column("batch", form="{}"), Column("what"),
        Column("launches", form="{:,}"), Column("MB", lambda cost: cost.bytes / 1e6, "{:,.0f}"),
        Column("GFLOP", lambda cost: cost.flops / 1e9, "{:,.0f}"),
        *(Column(f"{gpu}, ms", lambda cost, gpu=gpu: 1e3 * cost.seconds[gpu], "{:.2f}")
          for gpu in gpus),
    ]  # fmt: skip
