"""Registration, derivatives and public function of the sampler's step."""

import torch
from torch import Tensor

from ..checks import check_latents, check_like, check_vector
from ..coefficients import per_sample, scaled_sum
from ..dispatch.backend import Op
from ..dispatch.operators import Operator
from . import cuda, reference


def _triton():
    from . import triton

    return triton


OP = Op("transition_step", _triton, cuda)


def _forward_fake(x, *_):
    return x.new_empty(x.shape)


def _backward_fake(d, x, F_cond, F_uncond, noise, guidance, a, b, c, needs):
    tensors = zip((x, F_cond, F_uncond, noise), needs, strict=False)
    made = [t.new_empty(t.shape) if needed else x.new_empty(0) for t, needed in tensors]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return *made, x.new_empty((4, x.shape[0]), dtype=dtype)


_INPUTS = (
    "Tensor x, Tensor F_cond, Tensor? F_uncond, Tensor? noise, Tensor? guidance, "
    "Tensor a, Tensor b, Tensor? c"
)
forward_op = Operator(OP, f"transition_step({_INPUTS}) -> Tensor", _forward_fake)
backward_op = Operator(
    OP,
    f"transition_step_backward(Tensor d, {_INPUTS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)


def _vjp(inputs, needs, d):
    *tensors, sums = backward_op(d, *inputs, (*needs[:4], any(needs[4:])))
    da, db, dc, dguidance = sums.unbind(0)
    gradients = *tensors, dguidance, da, db, dc
    triples = zip(gradients, inputs, needs, strict=True)
    return tuple(g.to(value.dtype) if needed else None for g, value, needed in triples)


def _check(x, F_cond, F_uncond, noise, guidance, a, b, c) -> bool:
    check_latents("x", x)
    for name, tensor in (("F_cond", F_cond), ("F_uncond", F_uncond), ("noise", noise)):
        if tensor is not None:
            check_like(name, tensor, x.shape[0], "x", x)
    for name, vector in dict(guidance=guidance, a=a, b=b, c=c).items():
        if vector is not None:
            check_vector(name, vector, x.shape[0], x)
    return False  # a float64 state has kernels


def _reference(x, F_cond, F_uncond, noise, guidance, a, b, c):
    return reference.transition_step(x, F_cond, (a, b, c), F_uncond, guidance, noise)


def _on_cpu(x, F_cond, F_uncond, noise, guidance, a, b, c):
    """In fewer operations, where no dtype has to change but those of the network's answers."""
    coefficients = (a, b) if guidance is None else (a, b, guidance)
    if noise is not None or any(row.dtype != x.dtype for row in coefficients):
        return _reference(x, F_cond, F_uncond, noise, guidance, a, b, c)
    F = F_cond.to(x.dtype)
    if F_uncond is not None:
        F = torch.lerp(F_uncond.to(x.dtype), F, per_sample(guidance, x))
    return scaled_sum(a, x, b, F)


_call = forward_op.differentiable(8, _check, _reference, _vjp, _on_cpu)


def transition_step(
    x: Tensor,
    F_cond: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor | None],
    F_uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Carry the state x to an earlier time, x_r = a x + b F + c noise, in one launch.

    F = F_uncond + guidance·(F_cond − F_uncond) is classifier-free guidance (arXiv 2207.12598);
    without F_uncond, F = F_cond. The coefficients are those of a transport's step (arXiv
    2509.04394, section 3.4). Differentiable in every tensor.

    Args:
        x: the state (B, …); float64 or any narrower floating dtype.
        F_cond, F_uncond: what the network says, shaped as x, any floating dtype.
        coefficients: (a, b, c), each (B,); c is needed with noise only.
        guidance: one number, or one a sample (B,); a tensor saves a launch.
        noise: shaped as x.

    Returns x's shape and dtype, computed in float64 if x is float64, else in float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Example:
        >>> x, F_cond, F_uncond = torch.randn(3, 2, 4, 8, 8)
        >>> coefficients = torch.ones(2), torch.full((2,), -0.5), None  # linear flow: x − (t − r) F
        >>> x = transition_step(x, F_cond, coefficients, F_uncond, guidance=1.5)
    """
    a, b, c = coefficients
    if noise is None:
        c = None
    elif c is None:
        raise ValueError("noise needs the third coefficient, got None")
    if F_uncond is None:
        guidance = None
    elif not isinstance(guidance, Tensor):
        wide = torch.promote_types(x.dtype, torch.float32)
        guidance = x.new_full((x.shape[0],), guidance, dtype=wide)
    return _call(x, F_cond, F_uncond, noise, guidance, a, b, c)
