"""Registration, derivatives and public function of the transition loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_latents, check_like, check_vector, is_double
from ..coefficients import per_sample, scaled_sum
from ..dispatch.backend import Op
from ..dispatch.operators import Operator
from . import cuda, reference


def _triton():
    from . import triton

    return triton


OP = Op("transition_loss", _triton, cuda)


def _forward_fake(prediction, *_):
    return prediction.new_empty((2, prediction.shape[0]), dtype=torch.float32)


def _backward_fake(d_squared, d_cosine, prediction, *_):
    return prediction.new_empty(prediction.shape)


_INPUTS = (
    "Tensor prediction, Tensor x, Tensor z, Tensor a_x, Tensor a_z, Tensor a_D, Tensor a_cond, "
    "Tensor a_uncond, Tensor? dF, float? epsilon, Tensor? F_cond, Tensor? F_uncond"
)
forward_op = Operator(OP, f"transition_loss({_INPUTS}) -> Tensor", _forward_fake)
backward_op = Operator(
    OP,
    f"transition_loss_backward(Tensor? d_squared, Tensor? d_cosine, {_INPUTS}) -> Tensor",
    _backward_fake,
)


def _vjp(args, needs, gradient):
    return () if gradient is None else (backward_op(*gradient.unbind(0), *args),)


def _check(
    prediction, x, z, a_x, a_z, a_D, a_cond, a_uncond, dF, epsilon, F_cond, F_uncond
) -> bool:  # fmt: skip
    check_latents("prediction", prediction)
    samples = prediction.shape[0]
    for name, tensor in dict(x=x, z=z, F_cond=F_cond, F_uncond=F_uncond).items():
        if tensor is not None:
            check_like(name, tensor, samples, "prediction", prediction)
    if (F_cond is None) != (F_uncond is None):
        raise ValueError("give both F_cond and F_uncond, or neither")
    coefficients = dict(x=a_x, z=a_z, dF=a_D, F_cond=a_cond, F_uncond=a_uncond)
    for name, vector in coefficients.items():
        check_vector(f"the coefficient of {name}", vector, samples, prediction)
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    if dF is not None:
        per_sample = 1 if epsilon is None else 2
        if dF.shape[0] % per_sample or dF.shape[0] > per_sample * samples:
            raise ValueError(
                f"dF must have {per_sample} of each of the trailing M ≤ {samples} samples; "
                f"got {tuple(dF.shape)}"
            )
        check_like("dF", dF, dF.shape[0], "prediction", prediction)
    return is_double(prediction, x, z)


def _reference(prediction, x, z, a_x, a_z, a_D, a_cond, a_uncond, *target):
    coefficients = a_x, a_z, a_D, a_cond, a_uncond
    return reference.transition_loss(prediction, x, z, coefficients, *target)


def _on_cpu(
    prediction, x, z, a_x, a_z, a_D, a_cond, a_uncond, dF, epsilon, F_cond, F_uncond
):  # fmt: skip
    """By PyTorch's own cosine similarity, the target made in place."""
    rows = a_x, a_z, a_D
    if F_cond is not None or any(row.dtype != torch.float32 for row in (x, z, *rows)):
        return _reference(
            prediction, x, z, *rows, a_cond, a_uncond, dF, epsilon, F_cond, F_uncond
        )  # fmt: skip
    prediction = prediction.float()
    with torch.no_grad():
        target = scaled_sum(a_x, x, a_z, z)
        if dF is not None:
            if epsilon is not None:
                later, earlier = dF.float().chunk(2)
                dF = (later - earlier).div_(2 * epsilon)
            last = x.shape[0] - dF.shape[0]
            target[last:].addcmul_(per_sample(a_D[last:], dF), dF)
    squared = (prediction - target).square().flatten(1).mean(1)
    cosine = F.cosine_similarity(prediction, target, dim=1, eps=reference.EPS)
    return squared, 1 - cosine.flatten(1).mean(1)


_call = forward_op.differentiable(1, _check, _reference, _vjp, _on_cpu)


def transition_loss(
    prediction: Tensor,
    x: Tensor,
    z: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    dF: Tensor | None = None,
    epsilon: float | None = None,
    F_cond: Tensor | None = None,
    F_uncond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Distance of a prediction from the target of a transition, two terms a sample.

    The target a_x x + a_z z + a_D D + a_c F_cond + a_u F_uncond of arXiv 2509.04394, equation 10
    is formed on the fly. It is a constant: only the prediction has a gradient and a tangent.
    squared is the mean of (prediction − target)², cosine the mean over positions of
    1 − cos(prediction, target) over channels, as torch.nn.functional.cosine_similarity has it.

    Args:
        prediction, x, z: (B, C, …); float32, bfloat16 or float16 (float64 runs on the reference).
        coefficients: of x, z, D, F_cond and F_uncond, each (B,).
        dF: D of the trailing M ≤ B samples, (M, C, …), the others having none; or, if `epsilon`
            is given, the network at t + epsilon and then at t − epsilon, (2·M, C, …), from which
            D = (F₊ − F₋)/2ε is subtracted in float32.
        F_cond, F_uncond: the enhancement's predictions (B, C, …); both or neither.

    Returns (squared, cosine), float32 (B,); not finite where an input is not.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Example:
        >>> F, x, z = torch.randn(3, 2, 4, 8, 8)
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> squared, cosine = transition_loss(F, x, z, (-one, one, zero, zero, zero))  # of z − x
    """
    squared, cosine = _call(
        prediction, x, z, *coefficients, dF, epsilon, F_cond, F_uncond
    )  # (2, B), or two (B,)
    return squared, cosine
