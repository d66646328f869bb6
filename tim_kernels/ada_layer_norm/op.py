"""adaLN and the gated residual: operators, derivatives and public functions."""

from typing import Literal

import torch
from torch import Tensor

from ..checks import (
    check_channels,
    check_cond,
    check_modulation,
    check_same_device,
    check_tokens,
    is_double,
)
from ..dispatch.backend import Op
from ..dispatch.operators import Operator
from ..segments import Segments, as_modulation, as_row, packing, unpacked
from . import cpu, cuda, reference
from .forms import is_of_token, sums


def _triton():
    from . import triton

    return triton


OP = Op("ada_layer_norm", _triton, cuda)


NORMS = "layer", "rms"


def _forward_fake(x, branch, gate, bias, shift, scale, weight, norm_bias, eps, norm, *packed):
    """x' and y, empty where there is no branch or no norm."""
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(
        0 if norm is None else x.shape
    )


def _backward_fake(
    dout, dy, x, branch, gate, bias, scale, weight, norm_bias, eps, norm, cu, max_length
):
    samples = x.shape[0] if cu is None else cu.shape[0] - 1
    dbranch = x.new_empty(0) if branch is None else branch.new_empty(x.shape)
    dgate, dscale = (
        cond.new_empty(cond.shape) if is_of_token(cond) else x.new_empty(0)
        for cond in (gate, scale)
    )
    totals = (sums(scale, norm_bias), samples, x.shape[-1])
    return x.new_empty(x.shape), dbranch, dgate, dscale, x.new_empty(totals, dtype=torch.float32)


_TAIL = (
    "Tensor? weight, Tensor? norm_bias, float eps, str? norm, Tensor? cu_seqlens, SymInt max_length"
)
ARGUMENTS = (
    "Tensor x, Tensor? branch, Tensor? gate, Tensor? bias, Tensor? shift, Tensor? scale, " + _TAIL
)
forward_op = Operator(OP, f"ada_layer_norm({ARGUMENTS}) -> (Tensor, Tensor)", _forward_fake)
backward_op = Operator(
    OP,
    "ada_layer_norm_backward(Tensor? dout, Tensor? dy, Tensor x, Tensor? branch, Tensor? gate, "
    f"Tensor? bias, Tensor? scale, {_TAIL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)


def _vjp(args, needs, dout, dy):
    x, branch, gate, bias, shift, scale, weight, norm_bias, eps, norm, cu, max_length = args
    if dout is not None and dout.numel() != x.numel():  # of an output that is not made
        dout = None
    if norm is None or (dy is not None and dy.numel() != x.numel()):
        dy = None
    if dy is None:
        shift = scale = weight = norm_bias = norm = None
    dx, dbranch, dgate, dscale, totals = backward_op(
        dout, dy, x, branch, gate, bias, scale, weight, norm_bias, eps, norm, cu, max_length
    )
    total, along, of_gate, of_bias = totals[:4].unbind(0)  # of dy, dy·x̂, …: see triton.py
    of_scale, of_weight, of_norm_bias = along, along, total
    if is_of_token(scale):
        of_norm_bias = totals[-1]
    elif scale is not None and (weight is not None or norm_bias is not None):
        factor = 1 + scale.float()
        of_weight, of_norm_bias = along * factor, total * factor
        of_scale = along if weight is None else along * weight
        of_scale = of_scale if norm_bias is None else of_scale + total * norm_bias
    return (
        dx, None if branch is None else dbranch,
        dgate if is_of_token(gate) else _like(of_gate, gate), _like(of_bias, bias),
        dy.reshape(shift.shape).to(shift.dtype) if is_of_token(shift) else _like(total, shift),
        dscale if is_of_token(scale) else _like(of_scale, scale),
        _like(of_weight, weight), _like(of_norm_bias, norm_bias),
    )  # fmt: skip


def _like(total: Tensor, row: Tensor | None) -> Tensor | None:
    """A (samples, C) float32 gradient in its row's shape and dtype."""
    return None if row is None else total.sum_to_size(row.shape).to(row.dtype)


def check(
    x, branch, gate, bias, shift, scale, weight, norm_bias, eps, norm, cu, max_length
) -> bool:
    samples = check_tokens("x", x, cu)
    if x.ndim != (3 if cu is None else 2):
        layout = "(B, N, C)" if cu is None else "(T, C), packed"
        raise ValueError(f"x must be {layout}, got {tuple(x.shape)}")
    if norm is not None and norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")
    check_same_device("x", x, x)
    if branch is not None:
        check_same_device("branch", branch, x)
        if branch.shape != x.shape:
            raise ValueError(
                f"branch must be shaped as x, {tuple(x.shape)}; got {tuple(branch.shape)}"
            )
    for name, cond in dict(gate=gate, shift=shift, scale=scale).items():
        if cond is not None:
            check_modulation(name, cond, samples, x, cu is not None)
    if bias is not None:
        check_cond("branch_bias", bias, samples, x.shape[-1], x)
    for name, vector in dict(weight=weight, bias=norm_bias).items():
        if vector is not None:
            check_channels(name, vector, x.shape[-1], x)
    return is_double(x, branch)


def _reference(x, branch, gate, bias, shift, scale, weight, norm_bias, eps, norm, cu, max_length):
    segments = unpacked(cu, max_length, x)
    affine = dict(weight=weight, bias=norm_bias, norm=norm)
    if branch is None:
        return None, reference.ada_layer_norm(x, shift, scale, eps, segments, **affine)
    if norm is None:
        return reference.gated_residual(x, branch, gate, bias, segments), None
    return reference.gated_residual_ada_layer_norm(
        x, branch, gate, shift, scale, eps, bias, segments, **affine
    )


def _on_cpu(*args):
    return cpu.run(*args[:10]) if cpu.takes(*args[:10]) else _reference(*args)


_call = forward_op.differentiable(8, check, _reference, _vjp, _on_cpu)


def arguments(
    x, branch, gate, branch_bias, shift, scale, weight, bias, eps, norm, segments
) -> tuple:
    """The operators', of the public functions'."""
    shift, scale = as_modulation(shift, x, segments), as_modulation(scale, x, segments)
    gate, branch_bias = as_modulation(gate, x, segments), as_row(branch_bias, x, segments)
    return (
        x, branch, gate, branch_bias, shift, scale, weight, bias, float(eps), norm,
        *packing(segments, "x", x),
    )  # fmt: skip


def ada_layer_norm(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    segments: Segments | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Literal["layer", "rms"] = "layer",
) -> Tensor:
    """(norm(x)·weight + bias)·(1 + scale) + shift, the adaptive LayerNorm of DiT (arXiv 2212.09748,
    section 3.2), or with `norm="rms"` its RMSNorm (arXiv 1910.07467, equation 4).

    Args:
        x: tokens (B, N, C), or (T, C) packed with `segments`; float32, bfloat16 or float16 (float64
            runs on the reference).
        shift, scale: any floating dtype; a row a sample, (B, C) or (B, 1, C), a row for all, (C,),
            (1, C) or (1, 1, C), or of each token, (B, N, C), (1, N, C) for all samples, or packed
            (T, C) or (1, T, C). (T, C) of as many tokens as samples is a row a sample: (1, T, C)
            is not. None adds nothing.
        eps: added to the variance, or to the mean square.
        weight, bias: the norm's own, (C,), any floating dtype; None leaves them out.
        norm: "layer" or "rms", without a mean.

    Returns x's shape and dtype; computed in float32 and rounded once. Gradients have the shapes
    that came in.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown norm.

    Example:
        >>> x, shift, scale = torch.randn(2, 16, 64), torch.randn(2, 64), torch.randn(2, 64)
        >>> ada_layer_norm(x, shift, scale).shape
        torch.Size([2, 16, 64])
    """
    rows = None, None, None, shift, scale
    return _call(*arguments(x, *rows, weight, bias, eps, norm, segments))[1]


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    branch_bias: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """x + gate·(branch + branch_bias).

    Args:
        x, branch: tokens (B, N, C), or (T, C) packed with `segments`.
        gate: as `shift` of `ada_layer_norm`, a row or of each token; None is one.
        branch_bias: a row a sample or for all.

    Returns x's shape and dtype; computed in float32 and rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Example:
        >>> x, branch, gate = torch.randn(2, 16, 64), torch.randn(2, 16, 64), torch.randn(2, 64)
        >>> gated_residual(x, branch, gate).shape
        torch.Size([2, 16, 64])
    """
    rows = branch, gate, branch_bias, None, None
    return _call(*arguments(x, *rows, None, None, 0.0, None, segments))[0]


def gated_residual_ada_layer_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    branch_bias: Tensor | None = None,
    segments: Segments | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Literal["layer", "rms"] = "layer",
) -> tuple[Tensor, Tensor]:
    """x' = x + gate·(branch + branch_bias) and y = (norm(x')·weight + bias)·(1 + scale) + shift, in
    one read.

    Arguments as for `gated_residual` and `ada_layer_norm`. Returns (x', y), each of x's shape
    and dtype; y is made of the unrounded x'. Without the norm, use `gated_residual`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown norm.

    Example:
        >>> x, branch = torch.randn(2, 2, 16, 64)
        >>> gate, shift, scale = torch.randn(3, 2, 64)
        >>> x, y = gated_residual_ada_layer_norm(x, branch, gate, shift, scale)
    """
    rows = branch, gate, branch_bias, shift, scale
    return _call(*arguments(x, *rows, weight, bias, eps, norm, segments))
