"""The transition objective (arXiv 2509.04394, sections 3.2–3.3)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from tim_kernels import transition_inputs, transition_loss
from tim_kernels.transition_inputs.op import TransitionInputs

from .checks import check_times, unordered_times
from .transports import Transport

TIME_WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "constant": lambda d, sigma: torch.ones_like(d),
    "reciprocal": lambda d, sigma: 1 / (d + sigma),
    "sqrt": lambda d, sigma: (d + sigma).rsqrt(),
    "square": lambda d, sigma: (d + sigma) ** -2,
    "Soft-Min-SNR": lambda d, sigma: 1 / (d**2 + sigma**2),
}
DERIVATIVES = ("dde", "jvp")


class TransitionLoss(NamedTuple):
    """`weighted` and `projection` are what one trains on, `denoising` what one watches; scalars."""

    weighted: Tensor
    projection: Tensor
    denoising: Tensor


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
    """

    def __init__(
        self,
        transport: Transport,
        diffusion_ratio: float = 0.5,
        consistency_ratio: float = 0.1,
        derivative_type: str = "dde",
        differential_epsilon: float = 0.005,
        weight_t_and_r: bool = True,
        weight_time_type: str = "constant",
        weight_time_tangent: bool = False,
        weight_time_sigmoid: bool = False,
        share_primal: bool = False,
    ):
        if derivative_type not in DERIVATIVES:
            raise ValueError(
                f"derivative_type must be one of {DERIVATIVES}, got {derivative_type!r}"
            )
        if weight_time_type not in TIME_WEIGHTS:
            raise ValueError(
                f"weight_time_type must be one of {', '.join(TIME_WEIGHTS)}; "
                f"got {weight_time_type!r}"
            )
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

    def sample_times(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor, int]:
        """Draw t and r ≤ t, float32 (batch,), and the number of leading samples with r = t."""
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
    ) -> TransitionLoss:
        """The loss of one batch.

        x data and z noise are (B, C, H, W), y the conditioning that `model` takes,
        features_target (B, N, z_dim) the vision encoder's features. An enhanced target needs
        `ema_model` and y_null, the conditioning that means "nothing". t and r are drawn unless
        given, as (B,) float tensors; n_diffusion promises r = t for that many leading samples
        and saves their derivative. Raises ValueError for inputs that do not fit.
        """
        self._check(x, z, ema_model, y_null, t, r)
        if t is None:
            t, r, n_diffusion = self.sample_times(x.shape[0], device=x.device)
        n_diffusion = n_diffusion or 0
        inputs = self._inputs(x, z, t, n_diffusion)
        predict = self._predict_shared if self._can_share(model, t, n_diffusion) else self._predict
        with_features = features_target is not None
        prediction, *features, dF = predict(model, inputs, y, t, r, n_diffusion, with_features)
        projection = x.new_zeros(())
        if with_features:
            similarity = F.cosine_similarity(features[0].float(), features_target.float(), dim=-1)
            projection = (1 - similarity).mean()

        with torch.no_grad():
            F_cond = F_uncond = None
            if self.transport.enhance_target:
                x_t, time = inputs.x_t.repeat(2, 1, 1, 1), t.repeat(2)
                both = ema_model(x_t, *self._network_times(time, time), torch.cat((y, y_null)))
                F_cond, F_uncond = both.chunk(2)
            coefficients = self.transport.target_coefficients(t, r)
        epsilon = self.differential_epsilon if self._is_difference else None
        terms = transition_loss(prediction, x, z, coefficients, dF, epsilon, F_cond, F_uncond)
        loss = sum(_finite(term) for term in terms)
        weight = self.time_weight(t, r) / (loss.detach() + 1e-5)
        return TransitionLoss((weight * loss).mean(), projection, loss.detach().mean())

    def _predict(self, model, inputs: TransitionInputs, y, t, r, n_diffusion, with_features):
        """Prediction, perhaps features, and `_derivative` of all but the first n_diffusion."""
        outputs = self._network(model, inputs.x_t, t, r, y, with_features)
        if n_diffusion == len(t):
            return *outputs, None
        rest = slice(n_diffusion, None)
        with torch.no_grad():
            return *outputs, self._derivative(model, inputs, y[rest], t[rest], r[rest])

    def _can_share(self, model, t, n_diffusion) -> bool:
        """DistributedDataParallel must see a forward, to make the gradients of all ranks equal in
        backward; that of the first n_diffusion samples is the only one that `model` itself gets."""
        is_wrapped = _unwrapped(model) is not model
        return self.share_primal and n_diffusion < len(t) and not (is_wrapped and n_diffusion == 0)

    def _predict_shared(self, model, inputs: TransitionInputs, y, t, r, n_diffusion, with_features):
        """`_predict` with the derivative of the rest from the forward that predicts them."""
        network, rest = _unwrapped(model), slice(n_diffusion, None)

        def trajectory(x_t, t):
            prediction, *features = self._network(network, x_t, t, r[rest], y[rest], with_features)
            return prediction, features

        primals = inputs.x_t[rest], t[rest]
        tangents = inputs.v_t, torch.ones_like(t[rest])
        prediction, dF, features = torch.func.jvp(trajectory, primals, tangents, has_aux=True)
        outputs = prediction, *features
        if n_diffusion:
            first = (tensor[:n_diffusion] for tensor in (inputs.x_t, t, r, y))
            diffusion = self._network(model, *first, with_features)
            outputs = map(torch.cat, zip(diffusion, outputs, strict=True))
        return *outputs, dF.detach()

    def _network(self, model, x_t, t, r, y, with_features) -> tuple[Tensor, ...]:
        """The prediction and, if asked for, the features."""
        times = self._network_times(t, r)
        if with_features:
            return model(x_t, *times, y, return_features=True)
        return (model(x_t, *times, y),)

    def time_weight(self, t: Tensor, r: Tensor) -> Tensor:
        """w(t, r), (B,); 1 where r = t."""
        rescale = self._time_rescaling()
        delta = rescale(t) - rescale(r) if self.weight_t_and_r else rescale(t)
        weight = TIME_WEIGHTS[self.weight_time_type](delta, self.transport.sigma_d)
        return torch.where(r == t, torch.ones_like(weight), weight)

    def _time_rescaling(self) -> Callable[[Tensor], Tensor]:
        if self.weight_time_tangent:
            return torch.tan
        if self.weight_time_sigmoid:
            return lambda t: t / (1 - t)
        return lambda t: t

    @property
    def _is_difference(self) -> bool:
        return self.derivative_type == "dde"

    def derivative(self, model: nn.Module, x: Tensor, z: Tensor, y: Tensor, t: Tensor, r: Tensor):
        """dF/dt along the trajectory x_t = α x + σ z with r held, (B, C, H, W), no gradient."""
        with torch.no_grad():
            dF = self._derivative(model, self._inputs(x, z, t), y, t, r)
            if not self._is_difference:
                return dF
            later, earlier = dF.to(torch.promote_types(dF.dtype, torch.float32)).chunk(2)
            return (later - earlier) / (2 * self.differential_epsilon)

    def _inputs(self, x: Tensor, z: Tensor, t: Tensor, n_diffusion: int = 0) -> TransitionInputs:
        """x_t, and of all but the first n_diffusion samples what the derivative needs."""
        if not self._is_difference:
            alpha, sigma, d_alpha, d_sigma = self.transport.interpolant(t)
            return transition_inputs(
                x, z, alpha, sigma, d_alpha[n_diffusion:], d_sigma[n_diffusion:]
            )
        batch, (later, earlier) = x.shape[0], self._around(t[n_diffusion:])
        alpha, sigma, _, _ = self.transport.interpolant(torch.cat((t, later, earlier)))
        return transition_inputs(
            x, z, alpha[:batch], sigma[:batch], alpha_pm=alpha[batch:], sigma_pm=sigma[batch:]
        )

    def _around(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t + self.differential_epsilon, t - self.differential_epsilon

    def _derivative(self, model, inputs: TransitionInputs, y, t, r) -> Tensor:
        """dF/dt of the trailing len(t) samples, or for "dde" F(t + ε) and F(t − ε), stacked."""
        network = _unwrapped(model)
        if self._is_difference:
            times = self._network_times(torch.cat(self._around(t)), r.repeat(2))
            with unordered_times():
                return network(inputs.x_pm, *times, torch.cat((y, y)))

        def trajectory(x_t, t):
            return network(x_t, *self._network_times(t, r), y)

        x_t = inputs.x_t[-len(t) :]
        return torch.func.jvp(trajectory, (x_t, t), (inputs.v_t, torch.ones_like(t)))[1]

    def _network_times(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.transport.network_time(t), self.transport.network_time(r)

    def _check(self, x, z, ema_model, y_null, t, r) -> None:
        if x.shape != z.shape or x.ndim != 4:
            raise ValueError(
                f"x and z must have one shape (B, C, H, W), got {tuple(x.shape)}, {tuple(z.shape)}"
            )
        if (t is None) != (r is None):
            raise ValueError("give both t and r, or neither")
        if t is not None:
            check_times(t, r, x.shape[0])
        if self.transport.enhance_target and (ema_model is None or y_null is None):
            raise ValueError("an enhanced target needs ema_model and y_null")


def _unwrapped(model: nn.Module) -> nn.Module:
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _finite(loss: Tensor) -> Tensor:
    return torch.nan_to_num(loss, nan=0.0, posinf=1e5, neginf=-1e5)
