"""Guidance by diffusers' guiders, which modular pipelines have as components."""

from typing import Any

import torch
from torch import Tensor

from tim.sampling import Step

# Those whose result hangs on the predictions with and without the condition alone.
COMBINING = (
    "ClassifierFreeGuidance", "ClassifierFreeZeroStarGuidance", "AdaptiveProjectedGuidance",
    "AdaptiveProjectedMixGuidance", "TangentialClassifierFreeGuidance", "MagnitudeAwareGuidance",
    "FrequencyDecoupledGuidance",
)  # fmt: skip
FLAT = "MagnitudeAwareGuidance"  # takes (B, C, N): its norm is of two dimensions


class FromDiffusers:
    """A `tim.sampling.Guider` that asks one of diffusers, as its modular pipelines do.

    Raises:
        ValueError: it is none, or one that runs a changed network.
    """

    def __init__(self, guider: Any, num_steps: int):
        name = type(guider).__name__
        if name not in COMBINING:
            raise ValueError(
                f"guider must be one that combines predictions with and without the condition "
                f"({', '.join(COMBINING)}), got {name}"
            )
        self.guider, self.num_steps, self.is_flat = guider, num_steps, name == FLAT

    def acts(self, index: int, t: float) -> bool:
        self._at(index, t)
        return self.guider.num_conditions > 1

    def __call__(self, step: Step, F: Tensor, F_uncond: Tensor | None) -> Tensor:
        self._at(step.index, step.t)
        asked = self.guider.prepare_inputs({})
        for batch, prediction in zip(asked, (F, F_uncond), strict=False):
            batch.noise_pred = prediction.flatten(2) if self.is_flat else prediction
        made = self.guider(asked)[0]
        if made.shape != asked[0].noise_pred.shape:  # its pyramids need sides of 2ⁿ
            raise ValueError(
                f"{type(self.guider).__name__} does not guide states of {tuple(F.shape)}: it made "
                f"{tuple(made.shape)} of them"
            )
        return made.to(F.dtype).view_as(F)

    def _at(self, index: int, t: float) -> None:
        self.guider.set_state(index, self.num_steps, torch.tensor(t, dtype=torch.float64))
