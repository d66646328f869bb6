"""What a transport is, and what all transports share (arXiv 2509.04394, section 3)."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from tim.checks import whole
from tim_kernels.coefficients import weighted_sum


class Interpolant(NamedTuple):
    """x_t = alpha x + sigma z and v_t = d_alpha x + d_sigma z; each shaped as t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class TargetCoefficients(NamedTuple):
    """target = a_x x + a_z z + a_D D + a_cond F_cond + a_uncond F_uncond, each (B,)."""

    a_x: Tensor
    a_z: Tensor
    a_D: Tensor
    a_cond: Tensor
    a_uncond: Tensor


class StepCoefficients(NamedTuple):
    """x_r = a x_t + b F + c noise, each (B,)."""

    a: Tensor
    b: Tensor
    c: Tensor


class Transport(ABC):
    """How data x and noise z mix at time t, and how a state steps from t to r ≤ t.

    x_t = α x + σ z is the state and v_t = α' x + σ' z its velocity. A network F(x_t, c(t), c(r))
    is trained to be `target` and carries the state by `step`. Both are linear in the tensors with
    one coefficient a sample, so a transport is a handful of (B,) vectors, which
    `tim_kernels.transition_inputs`, `transition_loss` and `transition_step` multiply out in one
    launch each; `target` and `step` do it in plain PyTorch.

    D = dF/dt along the trajectory enters the target with a_D = −b / (∂b/∂t), b being that of the
    step: where x_r = a x_t + b F is to land in one point from every t, its derivative vanishes.

    Args:
        sigma_d: the data's standard deviation σ_d.
        T_max, T_min: where sampling starts and ends.
        enhance_target: replace the diffusion part P of the target by
            w_gt·P + w_cond·F_cond + (1 − w_gt − w_cond)·F_uncond where w_start ≤ t ≤ w_end,
            F_cond and F_uncond being the EMA network's predictions F(x_t, t, t).

    Raises:
        ValueError: T_max does not exceed T_min, or sigma_d is not positive.
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
        if not sigma_d > 0:
            raise ValueError(f"sigma_d must be positive, got {sigma_d}")
        self.sigma_d, self.T_max, self.T_min = sigma_d, T_max, T_min
        self.enhance_target = enhance_target
        self.w_gt, self.w_cond, self.w_start, self.w_end = w_gt, w_cond, w_start, w_end

    @abstractmethod
    def interpolant(self, t: Tensor) -> Interpolant:
        """α(t), σ(t) and their derivatives."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """c(t), the time that the network is given."""

    @abstractmethod
    def _sample_t(self, batch: int, **options: Any) -> Tensor:
        """(batch,) training times; `options` are those of torch.randn and torch.rand."""

    @abstractmethod
    def _target_parts(self, t: Tensor, r: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(a_x, a_z) of the diffusion part, then what (a_x, a_z, a_D) have beside it."""

    @abstractmethod
    def _step(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of the deterministic step."""

    def sample_t(
        self,
        batch: SupportsIndex,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw (batch,) training times."""
        batch = whole("batch", batch, 0)
        return self._sample_t(batch, generator=generator, device=device, dtype=dtype)

    def initial_state(self, noise: Tensor) -> Tensor:
        """The state at T_max, from which sampling starts: σ(T_max)·noise.

        `noise` is (B, …) of variance 1; the state has its shape and dtype. The data's part
        α(T_max)·x is left out. It is nothing, or next to nothing, in four transports; VE-SDE keeps
        it beside a noise of a hundred times its scale.
        """
        T_max = torch.tensor(self.T_max, dtype=torch.float64)
        return noise * float(self.interpolant(T_max).sigma)

    def target_coefficients(self, t: Tensor, r: Tensor) -> TargetCoefficients:
        """The coefficients of `target` for times t and r ≤ t, (B,) each."""
        (part_x, part_z), (rest_x, rest_z, a_D) = self._target_parts(t, r)
        if self.enhance_target:
            inside = (t >= self.w_start) & (t <= self.w_end)
            gt = torch.where(inside, self.w_gt, 1.0).to(t.dtype)
            a_cond = torch.where(inside, self.w_cond, 0.0).to(t.dtype)
            a_uncond = torch.where(inside, 1.0 - self.w_gt - self.w_cond, 0.0).to(t.dtype)
        else:
            gt, a_cond, a_uncond = torch.ones_like(t), torch.zeros_like(t), torch.zeros_like(t)
        a_x, a_z = gt * part_x + rest_x, gt * part_z + rest_z
        return TargetCoefficients(a_x, a_z, a_D, a_cond, a_uncond)

    def step_coefficients(
        self, t: Tensor, r: Tensor, stochasticity: float = 0.0
    ) -> StepCoefficients:
        """The coefficients of `step` from times t to r ≤ t, (B,) each.

        Raises:
            ValueError: a stochasticity that this transport does not have.
        """
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
        """What F(x_t, t, r) is trained to be (arXiv 2509.04394, equation 10), shaped as x.

        x data, z noise and dF = dF/dt along the trajectory are (B, …); None stands for zero.
        t and r are (B,).

        Raises:
            ValueError: with `enhance_target`, F_cond or F_uncond (B, …) is missing.
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
        """The state x_r (B, …) from x_t at times t to r ≤ t (both (B,)) with the prediction F.

        Raises:
            ValueError: stochasticity without noise shaped as x_t, or in a transport without it.
        """
        if stochasticity and noise is None:
            raise ValueError("a stochastic step needs noise shaped as x_t")
        coefficients = self.step_coefficients(t, r, stochasticity)
        return weighted_sum(coefficients, (x_t, F, noise if stochasticity else None))
