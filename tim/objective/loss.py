"""The loss of a batch."""

from typing import Literal, NamedTuple, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tim.checks import check_times, whole
from tim.transports import Transport
from tim_kernels import Packing, transition_loss

from .derivative import DERIVATIVES, Derivative, Difference, ForwardMode, predict
from .weights import TIME_WEIGHTS, TimeWeight, time_weight


class TransitionLoss(NamedTuple):
    """`weighted` and `projection` are what one trains on; scalars. What one watches is without the
    weight: `denoising`, a scalar, and the `terms` of each sample, squared and cosine, (2, B)."""

    weighted: Tensor
    projection: Tensor
    denoising: Tensor
    terms: Tensor


class TransitionObjective:
    """The loss of a network F(x_t, t, r, y) that steps from t to any earlier r.

    The first round(diffusion_ratio·B) samples of a batch train with r = t, the last
    round(consistency_ratio·B) with r = T_min. dF/dt along the trajectory, needed where r ≠ t,
    comes from a central difference over ±differential_epsilon (`derivative_type` "dde") or
    exactly from forward mode ("jvp"); it is a constant in the loss. With `share_primal`, for "jvp"
    alone, one dual forward gives the samples with r ≠ t their prediction and dF/dt: the same loss
    for one forward of them less. `weight_time_type` names the weight of δ = t − r (of t with
    `weight_t_and_r` off), where t and r go through tan or t/(1 − t) first with
    `weight_time_tangent` or `weight_time_sigmoid`.

    Raises:
        ValueError: an unknown name, ratios that are no shares of one batch, an ε that is not
            positive, or `share_primal` with a difference.
    """

    def __init__(
        self,
        transport: Transport,
        diffusion_ratio: float = 0.5,
        consistency_ratio: float = 0.1,
        derivative_type: Literal["dde", "jvp"] = "dde",
        differential_epsilon: float = 0.005,
        weight_t_and_r: bool = True,
        weight_time_type: TimeWeight = "constant",
        weight_time_tangent: bool = False,
        weight_time_sigmoid: bool = False,
        share_primal: bool = False,
    ):
        for name, known, given in (
            ("derivative_type", DERIVATIVES, derivative_type),
            ("weight_time_type", TIME_WEIGHTS, weight_time_type),
        ):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {given!r}")
        if min(diffusion_ratio, consistency_ratio) < 0 or diffusion_ratio + consistency_ratio > 1:
            raise ValueError(
                "diffusion_ratio and consistency_ratio must be shares of one batch, "
                f"got {diffusion_ratio} and {consistency_ratio}"
            )
        if not differential_epsilon > 0:
            raise ValueError(f"differential_epsilon must be positive, got {differential_epsilon}")
        if share_primal and derivative_type != "jvp":
            raise ValueError(
                f'share_primal needs derivative_type "jvp", got {derivative_type!r}: a difference '
                "has no forward at t itself to share"
            )
        self.transport = transport
        self.diffusion_ratio = diffusion_ratio
        self.consistency_ratio = consistency_ratio
        self.derivative_type = derivative_type
        self.differential_epsilon = differential_epsilon
        self.weight_t_and_r = weight_t_and_r
        self.weight_time_type = weight_time_type
        self.weight_time_tangent = weight_time_tangent
        self.weight_time_sigmoid = weight_time_sigmoid
        self.share_primal = share_primal

    @property
    def derivative(self) -> Derivative:
        """dF/dt as this objective takes it: called with (model, x, z, y, t, r), without gradient,
        it returns that of x and z (B, C, H, W) at times t and r (B,), (B, C, H, W)."""
        if self.derivative_type == "dde":
            return Difference(self.transport, self.differential_epsilon)
        return ForwardMode(self.transport, self.share_primal)

    def sample_times(
        self,
        batch: SupportsIndex,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor, int]:
        """Draw t and r ≤ t, float32 (batch,), and the number of leading samples with r = t."""
        batch = whole("batch", batch, 0)
        first, second = (
            self.transport.sample_t(batch, generator, device, torch.float32) for _ in range(2)
        )
        t, r = torch.maximum(first, second), torch.minimum(first, second)
        n_diffusion = round(self.diffusion_ratio * batch)
        n_consistency = round(self.consistency_ratio * batch)
        r[:n_diffusion] = t[:n_diffusion]
        r[batch - n_consistency :] = self.transport.T_min
        return t, r, n_diffusion

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        z: Tensor,
        y: Tensor,
        features_target: Tensor | None = None,
        ema_model: nn.Module | None = None,
        y_null: Tensor | None = None,
        t: Tensor | None = None,
        r: Tensor | None = None,
        n_diffusion: int | None = None,
        y_ema: Tensor | None = None,
        packing: Packing | None = None,
    ) -> TransitionLoss:
        """The loss of one batch: the mean over its samples, however many tokens they have.

        Args:
            x, z: data and noise (B, C, H, W).
            y: the conditioning that `model` takes.
            features_target: the vision encoder's features (B, N, z_dim), if they are aligned.
            ema_model, y_null: needed by an enhanced target; y_null, shaped as y, means "nothing".
            t, r: (B,) floating-point, r ≤ t; drawn unless given.
            n_diffusion: promises r = t for that many leading samples and saves their derivative.
            y_ema: the conditioning that `ema_model` sees, shaped as y; y itself by default. As
                published, class labels before dropping.
            packing: of B pictures of any sizes, whose tokens (T, C, p, p) then stand for
                (B, C, H, W), in x and z, and (T, z_dim) for (B, N, z_dim); `pack` makes them.

        Raises:
            ValueError: inputs that do not fit.
        """
        self._check(x, z, ema_model, y_null, t, r, packing)
        if t is None:
            samples = len(x if packing is None else packing)
            t, r, n_diffusion = self.sample_times(samples, device=x.device)
        n_diffusion = n_diffusion or 0
        derivative = self.derivative
        if packing is None:
            t_of_each, r_of_each, first = t, r, n_diffusion
        else:  # to arithmetic a token is a sample
            t_of_each, r_of_each = packing.spread(t), packing.spread(r)
            first = packing.tokens_of(n_diffusion)
        inputs = derivative.inputs(x, z, t_of_each, first)
        with_features = features_target is not None
        prediction, dF = derivative.predict(
            model, inputs, y, t, r, n_diffusion, with_features, packing
        )  # fmt: skip
        projection = x.new_zeros(())
        if with_features:
            features = prediction.features.float()
            if features.shape != features_target.shape:
                raise ValueError(
                    f"features_target must be {tuple(features.shape)} as the features, got "
                    f"{tuple(features_target.shape)}"
                )
            away = 1 - F.cosine_similarity(features, features_target.float(), dim=-1)
            projection = (away if packing is None else packing.means(away)).mean()

        F_cond, F_uncond = self._enhancement(
            ema_model, inputs.x_t, t, y if y_ema is None else y_ema, y_null, packing
        )
        terms = transition_loss(
            prediction.F, x, z, self.transport.target_coefficients(t_of_each, r_of_each),
            dF, derivative.epsilon, F_cond, F_uncond,
        )  # fmt: skip
        terms = torch.stack(terms)
        terms = _finite(terms if packing is None else packing.means(terms))
        loss = terms.sum(dim=0)
        weight = self.time_weight(t, r) / (loss.detach() + 1e-5)
        watched = loss.detach().mean(), terms.detach()
        return TransitionLoss((weight * loss).mean(), projection, *watched)

    @torch.no_grad()
    def _enhancement(
        self, ema_model, x_t, t, y, y_null, packing: Packing | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """F_cond and F_uncond at (x_t, t, t), from one doubled forward."""
        if not self.transport.enhance_target:
            return None, None
        x_t, t, y = x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat((y, y_null))
        both = dict(packing=packing and packing + packing)
        return predict(ema_model, self.transport, x_t, t, t, y, **both).F.chunk(2)

    def time_weight(self, t: Tensor, r: Tensor) -> Tensor:
        """w(t, r), (B,); 1 where r = t."""
        return time_weight(
            t, r, self.transport.sigma_d,
            weight_time_type=self.weight_time_type, weight_t_and_r=self.weight_t_and_r,
            weight_time_tangent=self.weight_time_tangent,
            weight_time_sigmoid=self.weight_time_sigmoid,
        )  # fmt: skip

    def _check(self, x, z, ema_model, y_null, t, r, packing) -> None:
        if x.shape != z.shape or x.ndim != 4:
            raise ValueError(
                f"x and z must have one shape (B, C, H, W), got {tuple(x.shape)}, {tuple(z.shape)}"
            )
        if packing is not None and len(x) != packing.total:
            raise ValueError(
                f"x must be the {packing.total} tokens of the packing, got {tuple(x.shape)}"
            )
        if (t is None) != (r is None):
            raise ValueError("give both t and r, or neither")
        if t is not None:
            check_times(t, r, len(x if packing is None else packing))
        if self.transport.enhance_target and (ema_model is None or y_null is None):
            raise ValueError("an enhanced target needs ema_model and y_null")


def _finite(loss: Tensor) -> Tensor:
    return torch.nan_to_num(loss, nan=0.0, posinf=1e5, neginf=-1e5)
