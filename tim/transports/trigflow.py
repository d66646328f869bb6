"""TrigFlow, interpolation along a quarter of a circle (arXiv 2410.11081)."""

from typing import Any

import torch
from torch import Tensor

from .base import Interpolant, Transport


class TrigFlow(Transport):
    """Data and noise as sides of a right angle.

    x_t = cos(t) x + sin(t) z, t = atan(exp(P_mean + P_std·n)) with n ~ N(0, 1), c(t) = t
    target = v_t − tan(t − r) (x_t + D)
    x_r = cos(t − r) x_t − sin(t − r) F
    """

    def __init__(
        self,
        P_mean: float = -1.0,
        P_std: float = 1.6,
        sigma_d: float = 0.5,
        T_max: float = 1.57,
        T_min: float = 0.0,
        **enhancement: Any,
    ):
        super().__init__(sigma_d, T_max, T_min, **enhancement)
        self.P_mean, self.P_std = P_mean, P_std

    def interpolant(self, t: Tensor) -> Interpolant:
        cos, sin = t.cos(), t.sin()
        return Interpolant(cos, sin, -sin, cos)

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def _sample_t(self, batch: int, **options: Any) -> Tensor:
        n = torch.randn(batch, **options)
        return torch.atan((n * self.P_std + self.P_mean).exp())

    def _target_parts(self, t: Tensor, r: Tensor):
        alpha, sigma, d_alpha, d_sigma = self.interpolant(t)
        tan = torch.tan(t - r)
        return (d_alpha, d_sigma), (-tan * alpha, -tan * sigma, -tan)

    def _step(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(t - r), -torch.sin(t - r)
