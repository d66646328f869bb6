"""adaLN and the gated residual: operators, derivatives and public functions."""

import torch
from torch import Tensor

from ..checks import check_cond, check_same_device, check_tokens, is_double
from ..dispatch.backend import Op
from ..dispatch.operators import Operator
from ..segments import Segments, packing, unpacked
from . import cpu, cuda, reference


def _triton():
    from . import triton

    return triton


OP = Op("ada_layer_norm", _triton, cuda)


def _made(x, branch, scale) -> tuple[Tensor, Tensor]:
    """x' and y, empty where there is no branch or no scale."""
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(
        0 if scale is None else x.shape
    )


def _forward_fake(x, branch, gate, bias, shift, scale, eps, cu, max_length):
    return _made(x, branch, scale)


def _backward_fake(dout, dy, x, branch, gate, bias, scale, eps, cu, max_length):
    samples = x.shape[0] if cu is None else cu.shape[0] - 1
    dbranch = x.new_empty(0) if branch is None else branch.new_empty(x.shape)
    sums = x.new_empty((4, samples, x.shape[-1]), dtype=torch.float32)
    return x.new_empty(x.shape), dbranch, sums


forward_op = Operator(
    OP,
    "ada_layer_norm(Tensor x, Tensor? branch, Tensor? gate, Tensor? bias, Tensor? shift, "
    "Tensor? scale, float eps, Tensor? cu_seqlens, SymInt max_length) -> (Tensor, Tensor)",
    _forward_fake,
)
backward_op = Operator(
    OP,
    "ada_layer_norm_backward(Tensor? dout, Tensor? dy, Tensor x, Tensor? branch, Tensor? gate, "
    "Tensor? bias, Tensor? scale, float eps, Tensor? cu_seqlens, SymInt max_length) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_fake,
)


def _vjp(args, needs, dout, dy):
    x, branch, gate, bias, shift, scale, eps, cu, max_length = args
    if dout is not None and dout.numel() != x.numel():  # of an output that is not made
        dout = None
    if scale is None or (dy is not None and dy.numel() != x.numel()):
        dy = None
    dx, dbranch, sums = backward_op(dout, dy, x, branch, gate, bias, scale, eps, cu, max_length)
    dshift, dscale, dgate, dbias = map(_like, sums.unbind(0), (shift, scale, gate, bias))
    if dy is None:
        dshift = dscale = None
    return dx, None if branch is None else dbranch, dgate, dbias, dshift, dscale


def _like(total: Tensor, row: Tensor | None) -> Tensor | None:
    """A (samples, C) float32 gradient in its row's leading size and dtype."""
    if row is None:
        return None
    return (total.sum(0, keepdim=True) if row.shape[0] == 1 else total).to(row.dtype)


def _check(x, branch, gate, bias, shift, scale, eps, cu, max_length) -> bool:
    samples = check_tokens("x", x, cu)
    if x.ndim != (3 if cu is None else 2):
        layout = "(B, N, C)" if cu is None else "(T, C), packed"
        raise ValueError(f"x must be {layout}, got {tuple(x.shape)}")
    check_same_device("x", x, x)
    if branch is not None:
        check_same_device("branch", branch, x)
        if branch.shape != x.shape:
            raise ValueError(
                f"branch must be shaped as x, {tuple(x.shape)}; got {tuple(branch.shape)}"
            )
    for name, row in dict(gate=gate, branch_bias=bias, shift=shift, scale=scale).items():
        if row is not None:
            check_cond(name, row, samples, x.shape[-1], x)
    return is_double(x, branch)


def _reference(x, branch, gate, bias, shift, scale, eps, cu, max_length):
    segments = unpacked(cu, max_length, x)
    if branch is None:
        return None, reference.ada_layer_norm(x, shift, scale, eps, segments)
    if scale is None:
        return reference.gated_residual(x, branch, gate, bias, segments), None
    return reference.gated_residual_ada_layer_norm(
        x, branch, gate, shift, scale, eps, bias, segments
    )


def _on_cpu(x, branch, gate, bias, shift, scale, eps, cu, max_length):
    if cpu.takes(x, branch, gate if branch is not None else None, bias):
        return cpu.run(x, branch, gate, bias, shift, scale, eps)
    return _reference(x, branch, gate, bias, shift, scale, eps, cu, max_length)


_call = forward_op.differentiable(6, _check, _reference, _vjp, _on_cpu)


def ada_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, segments: Segments | None = None
) -> Tensor:
    """LN(x)·(1 + scale) + shift, the adaptive LayerNorm of DiT (arXiv 2212.09748, section 3.2).

    Args:
        x: tokens (B, N, C), or (T, C) packed with `segments`; float32, bfloat16 or float16 (float64
            runs on the reference).
        shift, scale: one row a sample, (B, C) or (1, C), any floating dtype.
        eps: added to the variance.

    Returns x's shape and dtype; computed in float32 and rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Example:
        >>> x, shift, scale = torch.randn(2, 16, 64), torch.randn(2, 64), torch.randn(2, 64)
        >>> ada_layer_norm(x, shift, scale).shape
        torch.Size([2, 16, 64])
    """
    return _call(x, None, None, None, shift, scale, float(eps), *packing(segments, "x", x))[1]


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    branch_bias: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """x + gate·(branch + branch_bias).

    Args:
        x, branch: tokens (B, N, C), or (T, C) packed with `segments`.
        gate, branch_bias: one row a sample, (B, C) or (1, C).

    Returns x's shape and dtype; computed in float32 and rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Example:
        >>> x, branch, gate = torch.randn(2, 16, 64), torch.randn(2, 16, 64), torch.randn(2, 64)
        >>> gated_residual(x, branch, gate).shape
        torch.Size([2, 16, 64])
    """
    return _call(x, branch, gate, branch_bias, None, None, 0.0, *packing(segments, "x", x))[0]


def gated_residual_ada_layer_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    branch_bias: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate·(branch + branch_bias) and y = LN(x')·(1 + scale) + shift, in one read.

    Arguments as for `gated_residual` and `ada_layer_norm`. Returns (x', y), each of x's shape
    and dtype; y is made of the unrounded x'. Without the norm, use `gated_residual`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Example:
        >>> x, branch = torch.randn(2, 2, 16, 64)
        >>> gate, shift, scale = torch.randn(3, 2, 64)
        >>> x, y = gated_residual_ada_layer_norm(x, branch, gate, shift, scale)
    """
    return _call(x, branch, gate, branch_bias, shift, scale, float(eps), *packing(segments, "x", x))
