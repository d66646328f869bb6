"""The five transports of TiM (arXiv 2509.04394, section 3 and appendix).

A transport says how data x and noise z mix at time t, x_t = α x + σ z, what the network is
trained to predict and how a state steps from t to r ≤ t. Target and step are linear in the
tensors with one coefficient a sample, so a transport is a handful of (B,) vectors; the public
methods only multiply them out.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from tim_kernels.coefficients import weighted_sum


class TargetCoefficients(NamedTuple):
    """target = x·x_ + z·z_ + dF·dF_ + F_cond·cond_ + F_uncond·uncond_, each (B,)."""

    x: Tensor
    z: Tensor
    dF: Tensor
    F_cond: Tensor
    F_uncond: Tensor


class StepCoefficients(NamedTuple):
    """x_r = x·x_t + F·F_ + noise·noise_, each (B,)."""

    x: Tensor
    F: Tensor
    noise: Tensor


class Transport(ABC):
    """What all transports share.

    `enhance_target` replaces the diffusion part P of the target by
    w_gt·P + w_cond·F_cond + (1 − w_gt − w_cond)·F_uncond where w_start ≤ t ≤ w_end,
    F_cond and F_uncond being the EMA network's predictions F(x_t, t, t).
    """

    def __init__(
        self,
        sigma_d: float,
        T_max: float,
        T_min: float,
        enhance_target: bool = False,
        w_gt: float = 1.0,
        w_cond: float = 0.0,
        w_start: float = 0.0,
        w_end: float = 1.0,
    ):
        if not T_max > T_min:
            raise ValueError(f"T_max must exceed T_min, got {T_max} and {T_min}")
        self.sigma_d, self.T_max, self.T_min = sigma_d, T_max, T_min
        self.enhance_target = enhance_target
        self.w_gt, self.w_cond, self.w_start, self.w_end = w_gt, w_cond, w_start, w_end

    @abstractmethod
    def sample_t(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw (batch,) training times."""

    @abstractmethod
    def interpolant(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """α(t), σ(t) and their derivatives, each shaped as t."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """c(t), the time that the network is given."""

    @abstractmethod
    def _target_parts(self, t: Tensor, r: Tensor):
        """The diffusion part's (x, z) and the remainder's (x, z, dF) coefficients."""

    @abstractmethod
    def _step(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """The (x_t, F) coefficients of the deterministic step."""

    def target_coefficients(self, t: Tensor, r: Tensor) -> TargetCoefficients:
        """The (B,) vectors behind `target`."""
        (part_x, part_z), (rest_x, rest_z, rest_dF) = self._target_parts(t, r)
        if self.enhance_target:
            inside = (t >= self.w_start) & (t <= self.w_end)
            gt = torch.where(inside, self.w_gt, 1.0).to(t.dtype)
            cond = torch.where(inside, self.w_cond, 0.0).to(t.dtype)
            uncond = torch.where(inside, 1.0 - self.w_gt - self.w_cond, 0.0).to(t.dtype)
        else:
            gt, cond, uncond = torch.ones_like(t), torch.zeros_like(t), torch.zeros_like(t)
        return TargetCoefficients(gt * part_x + rest_x, gt * part_z + rest_z, rest_dF, cond, uncond)

    def step_coefficients(
        self, t: Tensor, r: Tensor, stochasticity: float = 0.0
    ) -> StepCoefficients:
        """The (B,) vectors behind `step`."""
        if stochasticity:
            raise ValueError(f"{type(self).__name__} has no stochastic step; only OT_FM has")
        return StepCoefficients(*self._step(t, r), torch.zeros_like(t))

    def target(
        self,
        x: Tensor,
        z: Tensor,
        t: Tensor,
        r: Tensor,
        dF: Tensor | None,
        F_cond: Tensor | None = None,
        F_uncond: Tensor | None = None,
    ) -> Tensor:
        """What F(x_t, t, r) is trained to be (arXiv 2509.04394, equation 10).

        x data, z noise and dF = dF/dt along the trajectory are (B, …); None stands for zero.
        t and r are (B,). With `enhance_target` F_cond and F_uncond are needed as well.
        """
        if self.enhance_target and (F_cond is None or F_uncond is None):
            raise ValueError("an enhanced target needs F_cond and F_uncond of the EMA network")
        if not self.enhance_target:
            F_cond = F_uncond = None
        return weighted_sum(self.target_coefficients(t, r), (x, z, dF, F_cond, F_uncond))

    def step(
        self,
        x_t: Tensor,
        t: Tensor,
        r: Tensor,
        F: Tensor,
        stochasticity: float = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Carry the state x_t (B, …) from times t to r ≤ t (both (B,)) with the prediction F."""
        if stochasticity and noise is None:
            raise ValueError("a stochastic step needs noise shaped as x_t")
        coefficients = self.step_coefficients(t, r, stochasticity)
        return weighted_sum(coefficients, (x_t, F, noise if stochasticity else None))


class OTFM(Transport):
    """Linear interpolation (flow matching): x_t = (1 − t) x + t z."""

    def __init__(self, P_mean=0.0, P_std=1.0, sigma_d=1.0, T_max=1.0, T_min=0.0, **enhancement):
        super().__init__(sigma_d, T_max, T_min, **enhancement)
        self.P_mean, self.P_std = P_mean, P_std

    def sample_t(self, batch, generator=None, device=None, dtype=None):
        return torch.sigmoid(_normal(self, batch, generator, device, dtype))

    def interpolant(self, t):
        one = torch.ones_like(t)
        return 1 - t, t, -one, one

    def network_time(self, t):
        return t

    def _target_parts(self, t, r):
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        return (-one, one), (zero, zero, r - t)

    def _step(self, t, r):
        return torch.ones_like(t), r - t

    def step_coefficients(self, t, r, stochasticity=0.0):
        """As everywhere; strictly inside (T_min, T_max) also a drift and √(2 s t dt)·noise."""
        if stochasticity < 0:
            raise ValueError(f"stochasticity must not be negative, got {stochasticity}")
        s = torch.where((t < self.T_max) & (r > self.T_min), stochasticity, 0.0).to(t.dtype)
        dt = t - r
        return StepCoefficients(1 - s * dt, -dt - s * (1 - t) * dt, (2 * s * t * dt).sqrt())


class TrigFlow(Transport):
    """x_t = cos(t) x + sin(t) z (arXiv 2410.11081)."""

    def __init__(self, P_mean=-1.0, P_std=1.6, sigma_d=0.5, T_max=1.57, T_min=0.0, **enhancement):
        super().__init__(sigma_d, T_max, T_min, **enhancement)
        self.P_mean, self.P_std = P_mean, P_std

    def sample_t(self, batch, generator=None, device=None, dtype=None):
        return torch.atan(_normal(self, batch, generator, device, dtype).exp())

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


class EDM(Transport):
    """The preconditioned diffusion of arXiv 2206.00364."""

    def __init__(self, P_mean=-1.2, P_std=1.2, sigma_d=0.5, T_max=80.0, T_min=0.01, **enhancement):
        super().__init__(sigma_d, T_max, T_min, **enhancement)
        self.P_mean, self.P_std = P_mean, P_std

    def sample_t(self, batch, generator=None, device=None, dtype=None):
        return _normal(self, batch, generator, device, dtype).exp()

    def interpolant(self, t):
        variance = t**2 + self.sigma_d**2
        norm, d_norm = variance.rsqrt(), -t * variance**-1.5
        return norm, t * norm, d_norm, norm + t * d_norm

    def network_time(self, t):
        return t.log() / 4

    def _target_parts(self, t, r):
        d2, d3 = self.sigma_d**2, self.sigma_d**3
        variance, cubic, dt = t**2 + d2, t**2 + d3, t - r
        norm, d_norm = variance.rsqrt(), -t * variance**-1.5
        part = t * norm / self.sigma_d, -self.sigma_d * norm
        d_part = (norm + t * d_norm) / self.sigma_d, -self.sigma_d * d_norm
        numerator = dt * variance * cubic
        b = numerator / (variance * cubic - t * dt * (2 * variance - cubic))
        return part, (b * d_part[0], b * d_part[1], -b)

    def _step(self, t, r):
        d2, d3 = self.sigma_d**2, self.sigma_d**3
        rho = ((t**2 + d2) / (r**2 + d2)).sqrt() / (d3 + t**2)
        return rho * (d3 + t * r), rho * d2 * (t - r)


class VPSDE(Transport):
    """Variance-preserving diffusion (arXiv 2011.13456)."""

    def __init__(
        self,
        beta_min=0.1,
        beta_d=19.9,
        epsilon_t=1e-5,
        T=1000,
        sigma_d=1.0,
        T_max=1.0,
        T_min=1e-5,
        **enhancement,
    ):
        super().__init__(sigma_d, T_max, T_min, **enhancement)
        self.beta_min, self.beta_d, self.epsilon_t, self.T = beta_min, beta_d, epsilon_t, T

    def _b(self, t: Tensor) -> Tensor:
        return torch.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t).sqrt()

    def _d_b(self, t: Tensor) -> Tensor:
        b = self._b(t)
        return (self.beta_d * t + self.beta_min) * (b**2 + 1) / (2 * b)

    def sample_t(self, batch, generator=None, device=None, dtype=None):
        u = torch.rand(batch, generator=generator, device=device, dtype=dtype)
        return 1 + u * (self.epsilon_t - 1)

    def interpolant(self, t):
        b, d_b = self._b(t), self._d_b(t)
        norm = (b**2 + 1).rsqrt()
        return norm, b * norm, -b * d_b * norm**3, d_b * norm**3

    def network_time(self, t):
        return (self.T - 1) * t

    def _target_parts(self, t, r):
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        return (zero, one), (zero, zero, -(self._b(t) - self._b(r)) / self._d_b(t))

    def _step(self, t, r):
        b_t, b_r = self._b(t), self._b(r)
        norm_r = (b_r**2 + 1).rsqrt()
        return (b_t**2 + 1).sqrt() * norm_r, (b_r - b_t) * norm_r


class VESDE(Transport):
    """Variance-exploding diffusion: x_t = x + t z (arXiv 2011.13456)."""

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


def _normal(transport, batch, generator, device, dtype) -> Tensor:
    draw = torch.randn(batch, generator=generator, device=device, dtype=dtype)
    return draw * transport.P_std + transport.P_mean


TRANSPORTS = {"OT_FM": OTFM, "TrigFlow": TrigFlow, "EDM": EDM, "VP_SDE": VPSDE, "VE_SDE": VESDE}


def make(name: str, **params) -> Transport:
    """The transport of a published name: OT_FM, TrigFlow, EDM, VP_SDE or VE_SDE."""
    if name not in TRANSPORTS:
        raise ValueError(f"no transport {name!r}; there are {', '.join(TRANSPORTS)}")
    try:
        return TRANSPORTS[name](**params)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
