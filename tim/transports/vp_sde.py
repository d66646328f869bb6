"""The variance-preserving SDE (arXiv 2011.13456)."""

from typing import Any

import torch
from torch import Tensor

from .base import Interpolant, Transport


class VPSDE(Transport):
    """Data and noise mixed to one variance, all of it the noise's in the end.

    b(t) = √(exp(½ β_d t² + β_min t) − 1)
    x_t = (x + b z) / √(b² + 1), t uniform from ε_t to 1, c(t) = (T − 1) t
    target = z − (b_t − b_r) / b'_t · D with b' = (β_d t + β_min) (b² + 1) / (2 b)
    x_r = (√(b_t² + 1) x_t + (b_r − b_t) F) / √(b_r² + 1)
    """

    def __init__(
        self,
        beta_min: float = 0.1,
        beta_d: float = 19.9,
        epsilon_t: float = 1e-5,
        T: int = 1000,
        sigma_d: float = 1.0,
        T_max: float = 1.0,
        T_min: float = 1e-5,
        **enhancement: Any,
    ):
        super().__init__(sigma_d, T_max, T_min, **enhancement)
        if not (beta_min > 0 and beta_d >= 0 and 0 < epsilon_t < 1):
            raise ValueError(
                "beta_min must be positive, beta_d not negative and epsilon_t in (0, 1); "
                f"got {beta_min}, {beta_d} and {epsilon_t}"
            )
        self.beta_min, self.beta_d, self.epsilon_t, self.T = beta_min, beta_d, epsilon_t, T

    def _b(self, t: Tensor) -> Tensor:
        return torch.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t).sqrt()

    def _d_b(self, t: Tensor) -> Tensor:
        b = self._b(t)
        return (self.beta_d * t + self.beta_min) * (b**2 + 1) / (2 * b)

    def interpolant(self, t: Tensor) -> Interpolant:
        b, d_b = self._b(t), self._d_b(t)
        alpha = (b**2 + 1).rsqrt()
        return Interpolant(alpha, b * alpha, -b * d_b * alpha**3, d_b * alpha**3)

    def network_time(self, t: Tensor) -> Tensor:
        return (self.T - 1) * t

    def _sample_t(self, batch: int, **options: Any) -> Tensor:
        u = torch.rand(batch, **options)
        return 1 + u * (self.epsilon_t - 1)

    def _target_parts(self, t: Tensor, r: Tensor):
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        return (zero, one), (zero, zero, -(self._b(t) - self._b(r)) / self._d_b(t))

    def _step(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        b_t, b_r = self._b(t), self._b(r)
        alpha_r = (b_r**2 + 1).rsqrt()
        return (b_t**2 + 1).sqrt() * alpha_r, (b_r - b_t) * alpha_r
