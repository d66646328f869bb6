"""What the calls of both pipelines have in common."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tim.sampling import SampleType
from tim.transports import Transport

from .callbacks import States, StepCallback
from .guidance import FromDiffusers
from .schedule import count_of, steps_of

OutputType = Literal["pil", "np", "pt", "latent"]
# Of "pil", "np", and "pt" or "latent"; of several sizes lists of them.
Pictures = list[Image.Image] | np.ndarray | Tensor | list[np.ndarray] | list[Tensor]
Side = SupportsIndex | Sequence[SupportsIndex] | None
Generators = torch.Generator | Sequence[torch.Generator]
SCALE, INTERVAL = 1.5, (0.0, 1.0)  # of guidance, where a call says nothing


@dataclass
class Call:
    """The options of a call, but for what it is conditioned on.

    Raises:
        ValueError: one does not fit, of what can be said before anything is computed.
    """

    height: Side
    width: Side
    num_inference_steps: SupportsIndex
    guidance_scale: float
    guidance_interval: tuple[float, float]
    stochasticity_ratio: float
    sample_type: SampleType
    generator: Generators | None
    latents: States | None
    output_type: OutputType
    return_dict: bool
    callback_on_step_end: StepCallback | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    sigmas: Iterable[float] | None
    timesteps: Iterable[float] | None
    guider: Any
    batch_invariant: bool

    def __post_init__(self):
        interval = self.guidance_interval
        if not isinstance(interval, (tuple, list)) or len(interval) != 2:
            raise ValueError(f"guidance_interval must be (low, high), got {interval!r}")
        _number("guidance_scale", self.guidance_scale)
        _number("stochasticity_ratio", self.stochasticity_ratio)
        low, high = (_number("guidance_interval", bound) for bound in interval)
        if low > high:
            raise ValueError(f"guidance_interval must be (low, high), got {interval}")
        if self.output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {self.output_type!r}")
        if isinstance(self.generator, tuple):
            self.generator = list(self.generator)  # as diffusers takes several
        several = self.generator if isinstance(self.generator, list) else [self.generator]
        if foreign := [x for x in several if not isinstance(x, torch.Generator | None)]:
            raise ValueError(f"generator must be a torch.Generator or a list, got {foreign[0]!r}")
        own = self.guidance_scale, tuple(interval)
        if self.guider is not None and own != (SCALE, INTERVAL):
            raise ValueError(
                "a guider has its own scale and steps: give it without guidance_scale and "
                "guidance_interval"
            )
        if self.batch_invariant and self.callback_on_step_end is not None:
            raise ValueError("batch_invariant draws one picture after the other: give no callback")

    @property
    def is_guided(self) -> bool:
        return self.guider is not None or self.guidance_scale > 1

    @property
    def is_ragged(self) -> bool:
        """Whether pictures have sizes of their own."""
        return is_several(self.height) or is_several(self.width)

    def sampling(self, transport: Transport, scheduler: Any) -> dict[str, Any]:
        """As arguments of `tim.sampling.sample`.

        Raises:
            ValueError: times, scheduler or guider do not fit.
        """
        low, high = self.guidance_interval
        options = steps_of(
            transport, scheduler, self.num_inference_steps, self.sigmas, self.timesteps
        )
        options |= dict(stochasticity_ratio=self.stochasticity_ratio, sample_type=self.sample_type)
        if self.guider is None:
            return options | dict(cfg_scale=self.guidance_scale, cfg_low=low, cfg_high=high)
        return options | dict(guider=FromDiffusers(self.guider, count_of(options)))


def is_several(side: Side) -> bool:
    """Whether a height or width is one of each picture."""
    return isinstance(side, (list, tuple)) or getattr(side, "ndim", 0) == 1


def _number(name: str, given: Any) -> float:
    """Of Python, numpy or a tensor of one; neither NaN, infinite nor negative."""
    if getattr(given, "ndim", None) == 0:
        given = given.item()
    if isinstance(given, bool) or not isinstance(given, Real) or not 0 <= given < math.inf:
        raise ValueError(f"{name} must be finite and 0 or more, got {given!r}")
    return float(given)
