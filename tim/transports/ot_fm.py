"""Flow matching along straight lines, also called optimal transport (arXiv 2210.02747)."""

from typing import Any

import torch
from torch import Tensor

from .base import Interpolant, StepCoefficients, Transport


class OTFM(Transport):
    """Linear interpolation; the published networks are trained with it.

    x_t = (1 − t) x + t z, t = sigmoid(P_mean + P_std·n) with n ~ N(0, 1), c(t) = t
    target = v_t − (t − r) D
    x_r = x_t − (t − r) F

    With stochasticity s > 0, where T_min < r and t < T_max, and dt = t − r:
    x_r = x_t − dt F − s dt (x_t + (1 − t) F) + √(2 s t dt) noise
    """

    def __init__(
        self,
        P_mean: float = 0.0,
        P_std: float = 1.0,
        sigma_d: float = 1.0,
        T_max: float = 1.0,
        T_min: float = 0.0,
        **enhancement: Any,
    ):
        super().__init__(sigma_d, T_max, T_min, **enhancement)
        self.P_mean, self.P_std = P_mean, P_std

    def interpolant(self, t: Tensor) -> Interpolant:
        one = torch.ones_like(t)
        return Interpolant(1 - t, t, -one, one)

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def _sample_t(self, batch: int, **options: Any) -> Tensor:
        n = torch.randn(batch, **options)
        return torch.sigmoid(n * self.P_std + self.P_mean)

    def _target_parts(self, t: Tensor, r: Tensor):
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        return (-one, one), (zero, zero, r - t)

    def _step(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), r - t

    def step_coefficients(
        self, t: Tensor, r: Tensor, stochasticity: float = 0.0
    ) -> StepCoefficients:
        if stochasticity < 0:
            raise ValueError(f"stochasticity must not be negative, got {stochasticity}")
        s = torch.where((t < self.T_max) & (r > self.T_min), stochasticity, 0.0).to(t.dtype)
        dt = t - r
        return StepCoefficients(1 - s * dt, -dt - s * (1 - t) * dt, (2 * s * t * dt).sqrt())
