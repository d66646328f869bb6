"""The variance-exploding SDE (arXiv 2011.13456)."""

import torch

from .base import Transport


class VESDE(Transport):
    """The data stay at their scale while noise of up to σ_max drowns them.

    x_t = x + t z, t log-uniform from σ_min to σ_max, c(t) = ln(t / 2)
    target = −z − (t − r) D
    x_r = x_t + (t − r) F
    """

    def __init__(
        self, sigma_min=0.02, sigma_max=100.0, sigma_d=1.0, T_max=100.0, T_min=0.02, **enhancement
    ):
        super().__init__(sigma_d, T_max, T_min, **enhancement)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def sample_t(self, batch, generator=None, device=None, dtype=None):
        u = torch.rand(batch, generator=generator, device=device, dtype=dtype)
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u

    def interpolant(self, t):
        return torch.ones_like(t), t, torch.zeros_like(t), torch.ones_like(t)

    def network_time(self, t):
        return (t / 2).log()

    def _target_parts(self, t, r):
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        return (zero, -one), (zero, zero, r - t)

    def _step(self, t, r):
        return torch.ones_like(t), t - r
