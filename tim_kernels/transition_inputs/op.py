"""Registration, derivatives and public function of the transition inputs."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_latents, check_like, check_vector, is_double
from ..coefficients import scaled_sum
from ..dispatch.backend import Op
from ..dispatch.operators import Operator
from . import cuda, reference


def _triton():
    from . import triton

    return triton


OP = Op("transition_inputs", _triton, cuda)


class TransitionInputs(NamedTuple):
    """What `transition_inputs` returns; None where it was not asked for."""

    x_t: Tensor
    v_t: Tensor | None
    x_pm: Tensor | None


def _made(x, d_alpha, alpha_pm) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        x.new_empty(0 if rows is None else (rows.shape[0], *x.shape[1:]))
        for rows in (x, d_alpha, alpha_pm)
    )


def _forward_fake(x, z, alpha, sigma, d_alpha, d_sigma, alpha_pm, sigma_pm):
    return _made(x, d_alpha, alpha_pm)


def _backward_fake(
    dx_t,
    dv_t,
    dx_pm,
    x,
    z,
    alpha,
    sigma,
    d_alpha,
    d_sigma,
    alpha_pm,
    sigma_pm,
    needs_dx,
    needs_dz,
    needs_sums,
):
    return (
        x.new_empty(x.shape if needs_dx else 0),
        z.new_empty(z.shape if needs_dz else 0),
        x.new_empty((8, x.shape[0]), dtype=torch.float32),
    )


_INPUTS = (
    "Tensor x, Tensor z, Tensor alpha, Tensor sigma, Tensor? d_alpha, Tensor? d_sigma, "
    "Tensor? alpha_pm, Tensor? sigma_pm"
)
forward_op = Operator(
    OP, f"transition_inputs({_INPUTS}) -> (Tensor, Tensor, Tensor)", _forward_fake
)
backward_op = Operator(
    OP,
    f"transition_inputs_backward(Tensor? dx_t, Tensor? dv_t, Tensor? dx_pm, {_INPUTS}, "
    "bool needs_dx, bool needs_dz, bool needs_sums) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)


def _vjp(inputs, needs, dx_t, dv_t, dx_pm):
    x, _, alpha, _, d_alpha, _, alpha_pm, _ = inputs
    dv_t = None if d_alpha is None else dv_t
    dx_pm = None if alpha_pm is None else dx_pm
    dx, dz, sums = backward_op(dx_t, dv_t, dx_pm, *inputs, needs[0], needs[1], any(needs[2:]))
    gradients = [dx if needs[0] else None, dz if needs[1] else None]
    for kind, (a, b) in enumerate(((alpha, sums[:2]), (d_alpha, sums[2:4]), (alpha_pm, None))):
        if a is None or not any(needs[2 + 2 * kind : 4 + 2 * kind]):
            gradients += None, None
        elif b is not None:
            last = x.shape[0] - a.shape[0]
            gradients += (total[last:] for total in b)
        else:
            last = x.shape[0] - a.shape[0] // 2
            gradients += (torch.cat((sums[i, last:], sums[i + 2, last:])) for i in (4, 5))
    pairs = zip(gradients, inputs, strict=True)
    return tuple(None if g is None else g.to(value.dtype) for g, value in pairs)


def _check(x, z, alpha, sigma, d_alpha, d_sigma, alpha_pm, sigma_pm) -> bool:
    check_latents("x", x)
    check_like("z", z, x.shape[0], "x", x)
    check_vector("alpha", alpha, x.shape[0], x)
    check_vector("sigma", sigma, x.shape[0], x)
    for names, a, b, per_sample in (
        (("d_alpha", "d_sigma"), d_alpha, d_sigma, 1),
        (("alpha_pm", "sigma_pm"), alpha_pm, sigma_pm, 2),
    ):
        if (a is None) != (b is None):
            raise ValueError(f"give both {names[0]} and {names[1]}, or neither")
        if a is None:
            continue
        if a.ndim != 1 or a.shape[0] % per_sample or a.shape[0] > per_sample * x.shape[0]:
            raise ValueError(
                f"{names[0]} must have {per_sample} numbers for each of the trailing M ≤ "
                f"{x.shape[0]} samples; got {tuple(a.shape)}"
            )
        check_vector(names[0], a, a.shape[0], x)
        check_vector(names[1], b, a.shape[0], x)
    if d_alpha is not None and alpha_pm is not None and alpha_pm.shape[0] != 2 * d_alpha.shape[0]:
        raise ValueError(
            f"alpha_pm must be ({2 * d_alpha.shape[0]},), two for each of d_alpha; "
            f"got {tuple(alpha_pm.shape)}"
        )
    return is_double(x, z)


def _on_cpu(x, z, *coefficients):
    """In fewer operations, where no dtype has to change."""
    if any(a is not None and a.dtype != torch.float32 for a in (x, z, *coefficients)):
        return reference.transition_inputs(x, z, *coefficients)
    alpha, sigma, d_alpha, d_sigma, alpha_pm, sigma_pm = coefficients
    x_t, v_t, x_pm = scaled_sum(alpha, x, sigma, z), None, None
    if d_alpha is not None:
        last = x.shape[0] - d_alpha.shape[0]
        v_t = scaled_sum(d_alpha, x[last:], d_sigma, z[last:])
    if alpha_pm is not None:
        last, rows = x.shape[0] - alpha_pm.shape[0] // 2, (2, -1, *[1] * (x.ndim - 1))
        x_pm = torch.addcmul(alpha_pm.view(rows) * x[last:], sigma_pm.view(rows), z[last:])
        x_pm = x_pm.flatten(0, 1)
    return x_t, v_t, x_pm


_call = forward_op.differentiable(8, _check, reference.transition_inputs, _vjp, _on_cpu)


def transition_inputs(
    x: Tensor,
    z: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    d_alpha: Tensor | None = None,
    d_sigma: Tensor | None = None,
    alpha_pm: Tensor | None = None,
    sigma_pm: Tensor | None = None,
) -> TransitionInputs:
    """What a network is asked on the trajectory from data x to noise z, from one read of both.

    x_t = α x + σ z is the state, v_t = α' x + σ' z its velocity and x_{t±ε} = α± x + σ± z its
    neighbours in time (arXiv 2509.04394, section 3.3); the last two for the trailing M samples,
    those that need a derivative. Differentiable in every argument.

    Args:
        x, z: latents (B, …); float32, bfloat16 or float16 (float64 runs on the reference).
        alpha, sigma: (B,), any floating dtype.
        d_alpha, d_sigma: α' and σ' of the trailing M ≤ B samples, (M,).
        alpha_pm, sigma_pm: α and σ of the trailing M samples, at t + ε and then at t − ε, (2·M,).

    Returns (x_t (B, …), v_t (M, …) or None, x_pm (2·M, …) or None) in x's dtype, computed in
    float32 and rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Example:
        >>> x, z, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8])
        >>> one = torch.ones(2)
        >>> x_t, v_t, _ = transition_inputs(x, z, 1 - t, t, -one, one)  # linear flow: v_t = z − x
    """
    x_t, v_t, x_pm = _call(x, z, alpha, sigma, d_alpha, d_sigma, alpha_pm, sigma_pm)
    return TransitionInputs(
        x_t, None if d_alpha is None else v_t, None if alpha_pm is None else x_pm
    )
