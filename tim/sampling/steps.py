"""What the steps of a run are, known before the first."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, SupportsIndex, get_args

import torch

from tim.checks import whole
from tim.transports import Transport

SampleType = Literal["transition", "ddiffusion"]
SAMPLE_TYPES: tuple[SampleType, ...] = get_args(SampleType)


class Step(NamedTuple):
    """From t to r; the network is asked for the way from t to `target`."""

    index: int
    t: float
    r: float
    target: float
    is_guided: bool
    stochasticity: float

    @property
    def kind(self) -> tuple[bool, float]:
        return self.is_guided, self.stochasticity


@dataclass(frozen=True)
class Options:
    """How a state is carried: see `sample`."""

    num_steps: SupportsIndex
    T_max: float | None = None
    T_min: float | None = None
    cfg_scale: float = 1.0
    cfg_low: float = 0.0
    cfg_high: float = 1.0
    stochasticity_ratio: float = 0.0
    sample_type: SampleType = "transition"

    @property
    def is_guided(self) -> bool:
        return self.cfg_scale > 1

    def steps(self, transport: Transport) -> list[Step]:
        """Raises ValueError for options out of range."""
        T_max = transport.T_max if self.T_max is None else self.T_max
        T_min = transport.T_min if self.T_min is None else self.T_min
        num_steps = whole("num_steps", self.num_steps, 1)
        self._check(T_max, T_min)
        times = torch.linspace(T_max, T_min, num_steps + 1, dtype=torch.float64).tolist()
        return [
            Step(
                index, t, r,
                target=r if self.sample_type == "transition" else t,
                is_guided=self.is_guided and self.cfg_low * T_max < t < self.cfg_high * T_max,
                stochasticity=self.stochasticity_ratio if t < T_max and r > T_min else 0.0,
            )
            for index, (t, r) in enumerate(zip(times[:-1], times[1:], strict=True))
        ]  # fmt: skip

    def _check(self, T_max: float, T_min: float) -> None:
        if not T_max > T_min:
            raise ValueError(f"T_max must exceed T_min, got {T_max} and {T_min}")
        if self.sample_type not in SAMPLE_TYPES:
            raise ValueError(f"sample_type must be one of {SAMPLE_TYPES}, got {self.sample_type!r}")
        if not 0 <= self.stochasticity_ratio < math.inf:
            raise ValueError(
                f"stochasticity_ratio must not be negative, got {self.stochasticity_ratio}"
            )
        if not math.isfinite(self.cfg_scale):
            raise ValueError(f"cfg_scale must be finite, got {self.cfg_scale}")
