"""The variance-exploding SDE (arXiv 2011.13456)."""

from typing import Any

import torch
from torch import Tensor

from .base import Interpolant, Transport


class VESDE(Transport):
    """The data stay at their scale while noise of up to σ_max drowns them.

    x_t = x + t z, t log-uniform from σ_min to σ_max, c(t) = ln(t / 2)
    target = −z − (t − r) D
    x_r = x_t + (t − r) F
    """

    def __init__(
        self,
        sigma_min: float = 0.02,
        sigma_max: float = 100.0,
        sigma_d: float = 1.0,
        T_max: float = 100.0,
        T_min: float = 0.02,
        **enhancement: Any,
    ):
        super().__init__(sigma_d, T_max, T_min, **enhancement)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min must be positive and below sigma_max, got {sigma_min} and {sigma_max}"
            )
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def interpolant(self, t: Tensor) -> Interpolant:
        return Interpolant(torch.ones_like(t), t, torch.zeros_like(t), torch.ones_like(t))

    def network_time(self, t: Tensor) -> Tensor:
        return (t / 2).log()

    def _sample_t(self, batch: int, **options: Any) -> Tensor:
        u = torch.rand(batch, **options)
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u

    def _target_parts(self, t: Tensor, r: Tensor):
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        return (zero, -one), (zero, zero, r - t)

    def _step(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t - r
