"""Registration, derivatives and public function of the embedding of a pair of times.

The sinusoids of all times are one operator; the layers above them stay F.linear and F.silu, on
the stacked rows of each embedder. Launches, forward, with two embedders: 1 for the sinusoids,
3 for each embedder (GEMM with bias, SiLU, GEMM with bias), 1 for a sum of two terms, 2 for a sum
of three; 7 in all for "t-r". With one embedder 4, and 1 or 2 for the sum. A kernel for both SiLUs
or for the sum of three would save one launch of a whole forward each, at rows too few to have
bytes worth saving, so they have none.
"""

import functools

import torch
from torch import Tensor

from ..checks import check_floating, is_double
from ..dispatch.backend import Op
from ..dispatch.operators import Operator
from ..launch.plans import made_apart
from ..names import CONDITIONS, Condition
from . import cuda, reference
from .reference import DIM, TimeMLP


def _triton():
    from . import triton

    return triton


OP = Op("time_pair_embedding", _triton, cuda)


def _forward_fake(t, r, times, dtype):
    return t.new_empty((times.count(",") + 1, t.shape[0], DIM), dtype=dtype)


def _backward_fake(dout, t, r, times):
    return t.new_empty(t.shape), r.new_empty(r.shape)


forward_op = Operator(
    OP,
    "time_pair_embedding(Tensor t, Tensor r, str times, ScalarType dtype) -> Tensor",
    _forward_fake,
)
backward_op = Operator(
    OP,
    "time_pair_embedding_backward(Tensor dout, Tensor t, Tensor r, str times) -> (Tensor, Tensor)",
    _backward_fake,
)


def _vjp(args, needs, dout):
    t, r, times, _ = args
    return (None, None) if dout is None else backward_op(dout, t, r, times)


def _is_double(t, r, times, dtype) -> bool:
    return is_double(t, r) or dtype == torch.float64


@functools.cache
def _frequencies() -> Tensor:
    return made_apart(reference.frequencies)


def _on_cpu(t, r, times, dtype):
    """All angles at once, from frequencies that are kept."""
    if t.dtype != torch.float32 or r.dtype != torch.float32:
        return reference.sinusoids(t, r, times, dtype)
    known = dict(zip(("t", "r", "t-r"), (t, r, t - r), strict=True))
    angles = torch.stack([known[time] for time in times.split(",")]).unsqueeze(-1) * _frequencies()
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)


_sinusoids = forward_op.differentiable(2, _is_double, reference.sinusoids, _vjp, _on_cpu)


def time_pair_embedding(
    t: Tensor,
    r: Tensor,
    t_mlp: TimeMLP,
    delta_mlp: TimeMLP | None = None,
    condition: Condition = "t-r",
) -> tuple[Tensor, Tensor]:
    """T(t) and the delta embedding of the pair (t, r) (arXiv 2509.04394).

    An embedder is a two-layer MLP of the sinusoid [cos(τ·f), sin(τ·f)] of a time τ, with
    f_i = exp(−ln(10000)·i/128), i < 128. The delta embedding is, with T and D the two embedders:
    "t-r": D(t−r); "r": D(r); "t,r": T(t)+D(r); "t,t-r": T(t)+D(t−r); "r,t-r": T(r)+D(t−r);
    "t,r,t-r": T(t)+T(r)+D(t−r). Only what the condition needs is computed.

    Args:
        t, r: network times (B,); float32, or bfloat16 or float16.
        t_mlp: the parameters of T: w1 (H, 256), b1 (H,), w2 (C, H), b2 (C,), of one dtype.
        delta_mlp: those of D, with the same C and dtype; None if T serves for both.
        condition: one of CONDITIONS.

    Returns two (B, C) tensors of the weights' dtype. The sinusoids are float32, rounded to it for
    the first layer. float64 runs on the reference.

    Raises:
        ValueError: a condition, shapes, dtypes or devices that do not fit.

    Example:
        >>> t, r = torch.tensor([0.9, 0.5]), torch.tensor([0.2, 0.5])
        >>> mlp = TimeMLP(torch.randn(8, 256), torch.zeros(8), torch.randn(8, 8), torch.zeros(8))
        >>> embedding, delta = time_pair_embedding(t, r, mlp, condition="t-r")  # (2, 8) each
    """
    delta_mlp = None if delta_mlp is not None and _same(delta_mlp, t_mlp) else delta_mlp
    _check(t, r, t_mlp, delta_mlp, condition)
    *summands, last = condition.split(",")
    times = ["t", "r", last] if "r" in summands else ["t", last]
    x = _sinusoids(t, r, ",".join(times), t_mlp.w1.dtype)  # (times, B, 256), the last for D
    rows = _rows(t_mlp, x) if delta_mlp is None else (*_rows(t_mlp, x[:-1]), delta_mlp(x[-1]))
    return rows[0], _sum(rows if "t" in summands else rows[1:])


def time_embedding(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The sinusoids of times (B,), (B, 256) in `dtype`, as `time_pair_embedding` forms them."""
    return _sinusoids(t, t, "t", dtype).squeeze(0)


def _rows(mlp: TimeMLP, x: Tensor) -> tuple[Tensor, ...]:
    """Of each time, (B, C), by one GEMM for all."""
    return mlp(x[0] if len(x) == 1 else x.flatten(0, 1)).chunk(len(x))


def _sum(terms: tuple[Tensor, ...]) -> Tensor:
    """The sum in float32, rounded once."""
    if len(terms) == 1:
        return terms[0]
    if len(terms) == 2:
        return terms[0] + terms[1]
    return torch.stack(terms).sum(0, dtype=terms[0].dtype)


def _same(a: TimeMLP, b: TimeMLP) -> bool:
    return all(one is other for one, other in zip(a, b, strict=True))


def _check(t: Tensor, r: Tensor, t_mlp: TimeMLP, delta_mlp: TimeMLP | None, condition: str) -> None:
    if condition not in CONDITIONS:
        raise ValueError(f"condition must be one of {CONDITIONS}, got {condition!r}")
    for name, time in (("t", t), ("r", r)):
        check_floating(name, time)
        if time.ndim != 1:
            raise ValueError(f"{name} must be (B,), got {tuple(time.shape)}")
    if r.shape != t.shape or r.device != t.device:
        raise ValueError(
            f"r must be shaped as t, {tuple(t.shape)} on {t.device}; "
            f"got {tuple(r.shape)} on {r.device}"
        )
    C, dtype = t_mlp.w2.shape[0], t_mlp.w1.dtype
    check_floating("t_mlp.w1", t_mlp.w1)
    for name, mlp in (("t_mlp", t_mlp), ("delta_mlp", delta_mlp)):
        if mlp is None:
            continue
        H = mlp.w1.shape[0]
        for field, shape in (("w1", (H, DIM)), ("b1", (H,)), ("w2", (C, H)), ("b2", (C,))):
            weight = getattr(mlp, field)
            if weight.shape != shape or weight.dtype != dtype or weight.device != t.device:
                raise ValueError(
                    f"{name}.{field} must be {dtype} {shape} on {t.device}; "
                    f"got {weight.dtype} {tuple(weight.shape)} on {weight.device}"
                )
