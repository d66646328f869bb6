"""Requests for single pictures, and which of them are one batch."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tim.checks import check_finite

from .steps import Options


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One picture: what `sample` takes of one sample.

    Args:
        z: its state at T_max, (C, H, W).
        y, y_null: its condition, a label () or text features (L, D), and "nothing".
        options: how it is carried.
        generator: of the noise of stochastic steps; its own, so that the noise is.
        name: yours, to know it by.

    Raises:
        ValueError: tensors that do not fit, or what guidance or noise needs is missing.
    """

    z: Tensor
    y: Tensor
    options: Options
    y_null: Tensor | None = None
    generator: torch.Generator | None = None
    name: Any = None

    def __post_init__(self):
        if self.z.ndim != 3 or not self.z.is_floating_point():
            raise ValueError(f"z must be one state (C, H, W), got {tuple(self.z.shape)}")
        check_finite("the initial state z", self.z)
        if self.y.ndim not in (0, 2):
            raise ValueError(f"y must be a label () or features (L, D), got {tuple(self.y.shape)}")
        if self.options.is_guided:
            check_guidance(self.options, self.y, self.y_null)
        if self.options.stochasticity_ratio and self.generator is None:
            raise ValueError("a stochastic request needs a generator of its own")

    @property
    def kind(self) -> tuple:
        """Those of one kind can be one batch; each has a guidance of its own, if any."""
        scale = float(self.options.cfg_scale > 1)  # of each, but for whether there is any
        options = dataclasses.replace(self.options, cfg_scale=scale)
        tensors = self.z, self.y, self.y_null if self.options.is_guided else None
        kinds = ((x.shape, x.dtype, x.device) for x in tensors if x is not None)
        return options, *kinds


def check_guidance(options: Options, y: Tensor, y_null: Tensor | None) -> None:
    """Refuse guidance without a y_null that is shaped as y."""
    if y_null is None:
        by = f"cfg_scale = {options.cfg_scale}" if options.guider is None else "a guider"
        raise ValueError(f"guidance ({by}) needs y_null")
    if y_null.shape != y.shape:
        raise ValueError(f"y_null must be shaped as y, {tuple(y.shape)}; got {tuple(y_null.shape)}")


def in_batches(
    requests: Iterable[Request | None], max_batch: int, max_waiting: int
) -> Iterator[list[Request]]:
    """Batches of one kind: full ones at once; where `max_waiting` wait, that of the oldest; at a
    None and at the end all."""
    waiting: dict[tuple, list[Request]] = {}  # by kind, in the order of each one's oldest
    for request in requests:
        if request is None:
            yield from waiting.values()
            waiting = {}
            continue
        kind = request.kind
        waiting.setdefault(kind, []).append(request)
        if len(waiting[kind]) == max_batch:
            yield waiting.pop(kind)
        elif sum(map(len, waiting.values())) >= max_waiting:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()
