"""dF/dt along the trajectory x_t = α x + σ z with r held (arXiv 2509.04394, section 3.3)."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from tim.checks import unordered_times
from tim.transports import Transport
from tim_kernels import Packing, transition_inputs
from tim_kernels.transition_inputs.op import TransitionInputs


class Prediction(NamedTuple):
    """What the network says at (x_t, t, r), and its features (B, N, z_dim) if asked for, of packed
    pictures (T, z_dim)."""

    F: Tensor
    features: Tensor | None = None


def predict(
    model: nn.Module,
    transport: Transport,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    y: Tensor,
    with_features: bool = False,
    packing: Packing | None = None,
) -> Prediction:
    """Ask a network about states x_t (B, C, H, W) at the transport's times c(t) and c(r), (B,), or
    with a `packing` about those of B pictures, (T, C, p, p)."""
    times = transport.network_time(t), transport.network_time(r)
    options = {} if packing is None else dict(packing=packing)
    if with_features:
        return Prediction(*model(x_t, *times, y, return_features=True, **options))
    return Prediction(model(x_t, *times, y, **options))


def _some(samples: slice, *given: Tensor | Packing | None) -> list[Any]:
    return [None if each is None else each[samples] for each in given]


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, out of DistributedDataParallel and the like."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """What a LoRA drops out: two draws of it have no difference in t."""
    dropping = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p and m.training]
    for module in dropping:
        module.eval()
    try:
        yield
    finally:
        for module in dropping:
            module.train()


class Derivative(ABC):
    """A way to have F of a batch, and dF/dt of its trailing samples, those with r ≠ t.

    With a `packing` of B pictures their tokens (T, C, p, p) stand for (B, C, H, W), and dF is that
    of the trailing pictures' tokens; t, r and y stay of pictures, but for `inputs`, to which a
    token is a sample.

    `epsilon` and the dF of `differentiate` and `predict` are what
    `tim_kernels.transition_loss` takes under these names.
    """

    epsilon: float | None = None

    def __init__(self, transport: Transport):
        self.transport = transport

    @abstractmethod
    def inputs(self, x: Tensor, z: Tensor, t: Tensor, n_diffusion: int = 0) -> TransitionInputs:
        """x_t, and of all but the first n_diffusion samples what `differentiate` needs."""

    @abstractmethod
    def differentiate(
        self,
        model: nn.Module,
        inputs: TransitionInputs,
        y: Tensor,
        t: Tensor,
        r: Tensor,
        packing: Packing | None = None,
    ) -> Tensor:
        """dF of the last len(t) samples of `inputs`, whose y, t, r and packing these are."""

    @abstractmethod
    def __call__(
        self, model: nn.Module, x: Tensor, z: Tensor, y: Tensor, t: Tensor, r: Tensor
    ) -> Tensor:
        """dF/dt (B, C, H, W) for x and z (B, C, H, W), t and r (B,)."""

    def predict(
        self,
        model: nn.Module,
        inputs: TransitionInputs,
        y: Tensor,
        t: Tensor,
        r: Tensor,
        n_diffusion: int,
        with_features: bool,
        packing: Packing | None = None,
    ) -> tuple[Prediction, Tensor | None]:
        """The prediction of all samples, and dF of all but the first n_diffusion or None."""
        prediction = predict(model, self.transport, inputs.x_t, t, r, y, with_features, packing)
        if n_diffusion == len(t):
            return prediction, None
        rest = _some(slice(n_diffusion, None), y, t, r, packing)
        with torch.no_grad(), _without_dropout(model):
            return prediction, self.differentiate(model, inputs, *rest)


class Difference(Derivative):
    """The published central difference ("dde"), (F(x_{t+ε}, t + ε, r) − F(x_{t−ε}, t − ε, r)) / 2ε.

    Both halves are one doubled forward, whatever the number of samples.
    """

    def __init__(self, transport: Transport, epsilon: float):
        super().__init__(transport)
        self.epsilon = epsilon

    def inputs(self, x, z, t, n_diffusion=0):
        batch, around = len(t), self._around(t[n_diffusion:])
        alpha, sigma, *_ = self.transport.interpolant(torch.cat((t, around)))
        return transition_inputs(
            x, z, alpha[:batch], sigma[:batch], alpha_pm=alpha[batch:], sigma_pm=sigma[batch:]
        )

    def differentiate(self, model, inputs, y, t, r, packing=None):
        """F(t + ε) and F(t − ε), stacked (2·M, C, H, W)."""
        both = dict(packing=packing and packing + packing)
        with unordered_times():
            x_pm, times = inputs.x_pm, (self._around(t), r.repeat(2))
            y = torch.cat((y, y))
            return predict(unwrapped(model), self.transport, x_pm, *times, y, **both).F

    def __call__(self, model, x, z, y, t, r):
        with torch.no_grad():
            F_pm = self.differentiate(model, self.inputs(x, z, t), y, t, r)
            later, earlier = F_pm.to(torch.promote_types(F_pm.dtype, torch.float32)).chunk(2)
            return (later - earlier) / (2 * self.epsilon)

    def _around(self, t: Tensor) -> Tensor:
        return torch.cat((t + self.epsilon, t - self.epsilon))


class ForwardMode(Derivative):
    """The exact derivative ("jvp"): that of F along (v_t, 1) in (x_t, t), by forward mode.

    With `share_primal` one dual forward gives the samples with a derivative their prediction too.
    """

    def __init__(self, transport: Transport, share_primal: bool = False):
        super().__init__(transport)
        self.share_primal = share_primal

    def inputs(self, x, z, t, n_diffusion=0):
        alpha, sigma, *velocity = self.transport.interpolant(t)
        return transition_inputs(x, z, alpha, sigma, *(d[n_diffusion:] for d in velocity))

    def differentiate(self, model, inputs, y, t, r, packing=None):
        return self._dual(unwrapped(model), inputs, y, t, r, packing, False)[1]

    def __call__(self, model, x, z, y, t, r):
        with torch.no_grad():
            return self.differentiate(model, self.inputs(x, z, t), y, t, r)

    def predict(self, model, inputs, y, t, r, n_diffusion, with_features, packing=None):
        if not self._can_share(model, t, n_diffusion):
            return super().predict(
                model, inputs, y, t, r, n_diffusion, with_features, packing
            )  # fmt: skip
        rest = _some(slice(n_diffusion, None), y, t, r, packing)
        prediction, dF = self._dual(unwrapped(model), inputs, *rest, with_features)
        if n_diffusion:
            x_t = inputs.x_t[: -len(inputs.v_t)]
            t, r, y, packing = _some(slice(n_diffusion), t, r, y, packing)
            diffusion = predict(model, self.transport, x_t, t, r, y, with_features, packing)
            prediction = Prediction(
                torch.cat((diffusion.F, prediction.F)),
                torch.cat((diffusion.features, prediction.features)) if with_features else None,
            )
        return prediction, dF.detach()

    def _dual(self, network, inputs: TransitionInputs, y, t, r, packing, with_features):
        """The prediction of the last len(t) samples and its derivative, from one forward."""

        def trajectory(x_t, t):
            F, features = predict(network, self.transport, x_t, t, r, y, with_features, packing)
            return F, [features] if with_features else []  # jvp takes no None

        primals = inputs.x_t[-len(inputs.v_t) :], t
        tangents = inputs.v_t, torch.ones_like(t)
        F, dF, features = torch.func.jvp(trajectory, primals, tangents, has_aux=True)
        return Prediction(F, *features), dF

    def _can_share(self, model, t, n_diffusion) -> bool:
        """DistributedDataParallel must see a forward, to make the gradients of all ranks equal in
        backward; that of the first n_diffusion samples is the only one that `model` itself gets."""
        is_wrapped = unwrapped(model) is not model
        return self.share_primal and n_diffusion < len(t) and not (is_wrapped and n_diffusion == 0)


DERIVATIVES: dict[str, type[Derivative]] = {"dde": Difference, "jvp": ForwardMode}
