"""TrigFlow, interpolation along a quarter of a circle (arXiv 2410.11081)."""

import torch

from .base import Transport, normal


class TrigFlow(Transport):
    """Data and noise as sides of a right angle.

    x_t = cos(t) x + sin(t) z, t = atan(exp(P_mean + P_std·n)) with n ~ N(0, 1), c(t) = t
    target = v_t − tan(t − r) (x_t + D)
    x_r = cos(t − r) x_t − sin(t − r) F
    """

    def __init__(self, P_mean=-1.0, P_std=1.6, sigma_d=0.5, T_max=1.57, T_min=0.0, **enhancement):
        super().__init__(sigma_d, T_max, T_min, **enhancement)
        self.P_mean, self.P_std = P_mean, P_std

    def sample_t(self, batch, generator=None, device=None, dtype=None):
        draw = normal(batch, self.P_mean, self.P_std, generator, device, dtype)
        return torch.atan(draw.exp())

    def interpolant(self, t):
        cos, sin = t.cos(), t.sin()
        return cos, sin, -sin, cos

    def network_time(self, t):
        return t

    def _target_parts(self, t, r):
        alpha, sigma, d_alpha, d_sigma = self.interpolant(t)
        tan = torch.tan(t - r)
        return (d_alpha, d_sigma), (-tan * alpha, -tan * sigma, -tan)

    def _step(self, t, r):
        return torch.cos(t - r), -torch.sin(t - r)
