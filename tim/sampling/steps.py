"""What the steps of a run are, known before the first."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, SupportsIndex, get_args

import torch
from torch import Tensor

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


class Guider(Protocol):
    """Guidance of one's own, in place of `cfg_scale`."""

    def acts(self, index: int, t: float) -> bool:
        """Whether the step of this index, which starts at t, needs the prediction without y."""

    def __call__(self, step: Step, F: Tensor, F_uncond: Tensor | None) -> Tensor:
        """The prediction that carries the state, of those with y and, if the guider acts, without;
        all (B, C, H, W) in float64. Asked at every step, in their order."""


@dataclass(frozen=True)
class Options:
    """How a state is carried: see `sample`."""

    num_steps: SupportsIndex | None = None
    T_max: float | None = None
    T_min: float | None = None
    cfg_scale: float = 1.0
    cfg_low: float = 0.0
    cfg_high: float = 1.0
    stochasticity_ratio: float = 0.0
    sample_type: SampleType = "transition"
    times: Iterable[float] | None = None
    guider: Guider | None = None

    def __post_init__(self):
        if self.times is not None:
            object.__setattr__(self, "times", decreasing("times", self.times))

    @property
    def is_guided(self) -> bool:
        return self.cfg_scale > 1 or self.guider is not None

    def steps(self, transport: Transport) -> list[Step]:
        """Raises ValueError for options out of range."""
        times = self._times(transport)
        T_max, T_min = times[0], times[-1]
        self._check()
        return [
            Step(
                index, t, r,
                target=r if self.sample_type == "transition" else t,
                is_guided=self._acts(index, t, T_max),
                stochasticity=self.stochasticity_ratio if t < T_max and r > T_min else 0.0,
            )
            for index, (t, r) in enumerate(zip(times[:-1], times[1:], strict=True))
        ]  # fmt: skip

    def _times(self, transport: Transport) -> list[float]:
        """Where the state is before the first step and after each."""
        if self.times is not None:
            if any(given is not None for given in (self.num_steps, self.T_max, self.T_min)):
                raise ValueError("times say all: give them without num_steps, T_max and T_min")
            return list(self.times)
        T_max = transport.T_max if self.T_max is None else self.T_max
        T_min = transport.T_min if self.T_min is None else self.T_min
        if not T_max > T_min:
            raise ValueError(f"T_max must exceed T_min, got {T_max} and {T_min}")
        num_steps = whole("num_steps", self.num_steps, 1)
        return torch.linspace(T_max, T_min, num_steps + 1, dtype=torch.float64).tolist()

    def _acts(self, index: int, t: float, T_max: float) -> bool:
        if self.guider is not None:
            return self.guider.acts(index, t)
        return self.is_guided and self.cfg_low * T_max < t < self.cfg_high * T_max

    def _check(self) -> None:
        if self.sample_type not in SAMPLE_TYPES:
            raise ValueError(f"sample_type must be one of {SAMPLE_TYPES}, got {self.sample_type!r}")
        if not 0 <= self.stochasticity_ratio < math.inf:
            raise ValueError(
                f"stochasticity_ratio must not be negative, got {self.stochasticity_ratio}"
            )
        if not math.isfinite(self.cfg_scale):
            raise ValueError(f"cfg_scale must be finite, got {self.cfg_scale}")
        if not self.cfg_low <= self.cfg_high:
            raise ValueError(
                f"cfg_low must not exceed cfg_high, got {self.cfg_low} and {self.cfg_high}"
            )
        if self.guider is not None and self.cfg_scale != 1:
            raise ValueError(f"a guider guides alone: cfg_scale must be 1, got {self.cfg_scale}")


def decreasing(name: str, times: Iterable[float]) -> tuple[float, ...]:
    """`times` as numbers.

    Raises:
        ValueError: they are none, or do not decrease.
    """
    try:
        found = tuple(float(time) for time in times)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, got {times!r}") from None
    pairs = zip(found, found[1:], strict=False)
    if len(found) < 2 or not all(math.inf > t > r > -math.inf for t, r in pairs):
        raise ValueError(f"{name} must be two numbers or more that decrease, got {list(found)}")
    return found
