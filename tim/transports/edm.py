"""EDM, the preconditioned diffusion (arXiv 2206.00364)."""

from typing import Any

import torch
from torch import Tensor

from .base import Interpolant, Transport


class EDM(Transport):
    """Noise of standard deviation t, brought to the network at variance 1.

    x_t = (x + t z) / √V_t with V_t = t² + σ_d² (c_in of the paper's section 5),
    t = exp(P_mean + P_std·n) with n ~ N(0, 1), c(t) = ln(t) / 4

    The diffusion part of the target is that section's (x − c_skip (x + t z)) / c_out, which is
    P = (t x / σ_d − σ_d z) / √V_t.

    target = P + B (∂P/∂t − D)
    x_r = √(V_t / V_r) / K_t · ((σ_d³ + t r) x_t + σ_d² (t − r) F), K_t = t² + σ_d³
    B = b / (∂b/∂t) = (t − r) V_t K_t / (V_t K_t − t (t − r) (2 V_t − K_t)),
    b being the step's coefficient of F.

    The step is the published one. It carries x_t along the trajectory with F = P where σ_d = 1;
    elsewhere that would take σ_d² and σ_d in place of its σ_d³ and σ_d².
    """

    def __init__(
        self,
        P_mean: float = -1.2,
        P_std: float = 1.2,
        sigma_d: float = 0.5,
        T_max: float = 80.0,
        T_min: float = 0.01,
        **enhancement: Any,
    ):
        super().__init__(sigma_d, T_max, T_min, **enhancement)
        self.P_mean, self.P_std = P_mean, P_std

    def interpolant(self, t: Tensor) -> Interpolant:
        V = t**2 + self.sigma_d**2
        alpha, d_alpha = V.rsqrt(), -t * V**-1.5
        return Interpolant(alpha, t * alpha, d_alpha, alpha + t * d_alpha)

    def network_time(self, t: Tensor) -> Tensor:
        return t.log() / 4

    def _sample_t(self, batch: int, **options: Any) -> Tensor:
        n = torch.randn(batch, **options)
        return (n * self.P_std + self.P_mean).exp()

    def _target_parts(self, t: Tensor, r: Tensor):
        sigma_d, dt = self.sigma_d, t - r
        alpha, sigma, d_alpha, d_sigma = self.interpolant(t)
        V, K = t**2 + sigma_d**2, t**2 + sigma_d**3
        part = sigma / sigma_d, -sigma_d * alpha
        d_part = d_sigma / sigma_d, -sigma_d * d_alpha
        B = dt * V * K / (V * K - t * dt * (2 * V - K))
        return part, (B * d_part[0], B * d_part[1], -B)

    def _step(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        d2, d3 = self.sigma_d**2, self.sigma_d**3
        rho = ((t**2 + d2) / (r**2 + d2)).sqrt() / (d3 + t**2)
        return rho * (d3 + t * r), rho * d2 * (t - r)
