"""Registration, derivatives and public function of QK-norm with axial RoPE."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import backend
from ..dispatch.operators import (
    define,
    differentiable,
    is_plain,
    remember_backend,
    remembered_backend,
)
from ..segments import Segments
from . import reference
from .arguments import arguments

NAME = "qk_norm_rope"
PLACES = "Tensor? positions, SymInt divisor, Tensor? divisors"
PACKING = "Tensor? cu_seqlens, SymInt max_length"


def _forward(q, *args):
    return backend.kernels(NAME, q).forward(q, *args)


def _forward_fake(q, k, *_):
    return q.new_empty(q.shape), q.new_empty(0) if k is None else k.new_empty(k.shape)


def _backward(dq_out, dk_out, q, k, *args):
    dq = q.new_empty(0 if dq_out is None else q.shape)
    dk = q.new_empty(0) if dk_out is None else k.new_empty(k.shape)
    filled = None if dq_out is None else dq, None if dk_out is None else dk
    return dq, dk, *backend.kernels(NAME, q).backward(dq_out, dk_out, q, k, *args, *filled)


def _backward_fake(dq_out, dk_out, q, k, q_weight, k_weight, q_shift, k_shift, *places):
    cu = places[-2]
    H, D = q.shape[-2:]
    samples = q.shape[0] if cu is None else cu.shape[0] - 1
    is_shifted = q_shift is not None or k_shift is not None
    return (
        q.new_empty(0 if dq_out is None else q.shape),
        q.new_empty(0) if dk_out is None else k.new_empty(k.shape),
        q.new_empty((2, samples if is_shifted else 0, H * D), dtype=torch.float32),
        q.new_empty((4, D), dtype=torch.float32),
    )


def _packed_backward(dq_out, dk_out, dv, qkv, *args):
    dqkv = qkv.new_empty(qkv.shape)
    gradients, slots = (dq_out, dk_out, dv), dqkv.unbind(-3)
    q, k, _ = qkv.unbind(-3)
    filled = [s if g is not None else None for s, g in zip(slots, gradients, strict=True)][:2]
    sums = backend.kernels(NAME, qkv).backward(dq_out, dk_out, q, k, *args, *filled)
    for slot, gradient in zip(slots, gradients, strict=True):
        if gradient is None:
            slot.zero_()
    if dv is not None:
        slots[2].copy_(dv)
    return dqkv, *sums


def _packed_backward_fake(dq_out, dk_out, dv, qkv, *args):
    q, k, _ = qkv.unbind(-3)
    return qkv.new_empty(qkv.shape), *_backward_fake(dq_out, dk_out, q, k, *args)[2:]


def _jvp(q, *args):
    return backend.kernels(NAME, q).jvp(q, *args)


forward_op = define(
    "qk_norm_rope(Tensor q, Tensor? k, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, "
    f"Tensor? k_bias, Tensor? q_shift, Tensor? k_shift, {PLACES}, float eps, {PACKING}) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward_op = define(
    "qk_norm_rope_backward(Tensor? dq_out, Tensor? dk_out, Tensor q, Tensor? k, Tensor? q_weight, "
    f"Tensor? k_weight, Tensor? q_shift, Tensor? k_shift, {PLACES}, float eps, {PACKING}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
packed_backward_op = define(
    "qkv_norm_rope_backward(Tensor? dq_out, Tensor? dk_out, Tensor? dv, Tensor qkv, "
    "Tensor? q_weight, Tensor? k_weight, Tensor? q_shift, Tensor? k_shift, "
    f"{PLACES}, float eps, {PACKING}) -> (Tensor, Tensor, Tensor)",
    _packed_backward,
    _packed_backward_fake,
)
jvp_op = define(
    "qk_norm_rope_jvp(Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor? q_shift, "
    "Tensor? k_shift, Tensor? tq, Tensor? tk, Tensor? tq_weight, Tensor? tq_bias, "
    "Tensor? tk_weight, Tensor? tk_bias, Tensor? tq_shift, Tensor? tk_shift, "
    f"{PLACES}, float eps, {PACKING}) -> (Tensor, Tensor)",
    _jvp,
    _forward_fake,
)


def _setup_context(ctx, inputs, output):
    q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift = inputs[:8]
    positions, divisor, divisors, eps, cu, max_length = inputs[8:]
    saved = q, k, q_weight, k_weight, q_shift, k_shift, positions, divisors, cu
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.divisor, ctx.eps, ctx.max_length = divisor, eps, max_length
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[2:8]]
    ctx.leading = [None if x is None else x.shape[0] for x in (q_shift, k_shift)]


def _saved(ctx):
    """The tokens (q and k, or qkv and None), then weights and shifts, then the operators' tail."""
    *tokens_and_rows, positions, divisors, cu = ctx.saved_tensors
    tail = positions, ctx.divisor, divisors, ctx.eps, cu, ctx.max_length
    return tokens_and_rows[:2], tokens_and_rows[2:], tail


def _vjp(ctx, dq_out, dk_out):
    (q, k), rows, tail = _saved(ctx)
    if k is None:
        dk_out = None
    dq, dk, *sums = backward_op(dq_out, dk_out, q, k, *rows, *tail)
    dq = None if dq_out is None else dq
    dk = None if dk_out is None else dk
    return dq, dk, *_row_gradients(ctx, *sums, dq_out, dk_out), *(None,) * 6


def _row_gradients(ctx, shifts: Tensor, affine: Tensor, dq_out, dk_out) -> list[Tensor | None]:
    """Gradients of the weights, biases and shifts in their own leading sizes and dtypes."""
    is_made = dq_out is not None, dk_out is not None
    rows = [*affine.unbind(0), *shifts.unbind(0)]
    for i, dtype in enumerate(ctx.dtypes):
        if dtype is None or not is_made[i // 2 if i < 4 else i - 4]:
            rows[i] = None
        elif i >= 4 and ctx.leading[i - 4] == 1:
            rows[i] = rows[i].sum(0, keepdim=True)
    return [
        None if row is None else row.to(dtype) for row, dtype in zip(rows, ctx.dtypes, strict=True)
    ]


def _tangent(ctx, *tangents):
    tokens, rows, tail = _saved(ctx)
    return jvp_op(*tokens, *rows, *tangents[:8], *tail)


_call = differentiable(forward_op, _setup_context, _vjp, _tangent)


class _Packed(torch.autograd.Function):
    """The same of a packed qkv, in eager code: v is a view, and backward fills one dqkv.

    An operator may not return a view, so torch.compile gets `_call` on views instead.
    """

    @staticmethod
    def forward(qkv, *args):
        q, k, v = (qkv.select(-3, i) for i in range(3))
        return *forward_op(q, k, *args), v

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        remember_backend(ctx)
        _setup_context(ctx, (inputs[0], None, *inputs[1:]), output)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_out, dk_out, dv):
        (qkv, _), rows, tail = _saved(ctx)
        with remembered_backend(ctx):
            dqkv, *sums = packed_backward_op(dq_out, dk_out, dv, qkv, *rows, *tail)
        return dqkv, *_row_gradients(ctx, *sums, dq_out, dk_out), *(None,) * 6

    @staticmethod
    def jvp(ctx, tqkv, *tangents):
        (qkv, _), rows, tail = _saved(ctx)
        q, k, _ = qkv.unbind(-3)
        tq, tk, tv = (None,) * 3 if tqkv is None else (tqkv.select(-3, i) for i in range(3))
        return *jvp_op(q, k, *rows, tq, tk, *tangents[:6], *tail), tv


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None = None,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    sizes: Tensor | None = None,
    order: str = "upstream",
    q_shift: Tensor | None = None,
    k_shift: Tensor | None = None,
    eps: float = 1e-5,
    segments: Segments | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RoPE(LN(q + q_shift)·q_weight + q_bias), and the same of k, in one read.

    LayerNorm over the channels of a head (QK-norm, arXiv 2302.05442, section 2) and axial RoPE
    (arXiv 2104.09864, in two dimensions): with f_j = 10000^(−2j/(head_dim/2)), the channels
    (2j, 2j + 1) of the head's first half turn by the angle position[0]·f_j, those of its second
    half by position[1]·f_j. Positions come from one of

    - `positions`: integers (N, 2) for all samples, (B, N, 2), or (T, 2) of packed tokens;
    - `grid` = (h, w), the row-major h×w grid of every sample: order "grid" gives token n its
      (column, row) = (n mod w, n div w), order "upstream" (n mod h, n div h), as the released
      weights of TiM (arXiv 2509.04394) were trained;
    - `sizes`: int32 (S, 2) on the device, each sample's own (h, w), with the same two orders.

    With none of them nothing is rotated.

    Args:
        q, k: (B, N, heads, head_dim), or (T, heads, head_dim) packed with `segments`; float32,
            bfloat16 or float16 (float64 runs on the reference). Views of a packed qkv are read in
            place. k is shaped as q.
        q_weight, q_bias, k_weight, k_bias: (head_dim,), any floating dtype; without a weight
            there is no norm, without a bias none is added.
        q_shift, k_shift: added before the norm, one row a sample, (B, heads·head_dim) or
            (1, heads·head_dim).
        eps: added to the variance.

    Returns q', or (q', k') if k is given: contiguous, in their inputs' dtypes, computed in
    float32 and rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, more than one source of positions,
            a rotated head_dim that is not a multiple of 4, an unknown order.
    """
    checked = arguments(
        q, k, dict(q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias),
        dict(q_shift=q_shift, k_shift=k_shift), positions, grid, sizes, order, eps, segments,
    )  # fmt: skip
    run = _reference if backend.is_reference(NAME, q, k) else _call
    outputs = run(q, k, *checked)
    return outputs[0] if k is None else tuple(outputs)


def qkv_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    sizes: Tensor | None = None,
    order: str = "upstream",
    q_shift: Tensor | None = None,
    k_shift: Tensor | None = None,
    eps: float = 1e-5,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope` of a packed qkv; in training it saves a copy of all three gradients.

    Backward writes dq and dk where they belong in one gradient of qkv's shape and copies dv
    beside them, where slicing qkv first would cost another pass to put the three together.

    Args:
        qkv: (B, N, 3, heads, head_dim), or (T, 3, heads, head_dim) packed with `segments`.
        others: as for `qk_norm_rope`.

    Returns (q', k', v): q' and k' as `qk_norm_rope` gives them, v a view of qkv.

    Raises:
        ValueError: as `qk_norm_rope`.
    """
    layout = "(B, N, 3, heads, head_dim)" if segments is None else "(T, 3, heads, head_dim)"
    if qkv.ndim != layout.count(",") + 1 or qkv.shape[-3] != 3:
        raise ValueError(f"qkv must be {layout}, got {tuple(qkv.shape)}")
    q, k, v = qkv.unbind(-3)
    checked = arguments(
        q, k, dict(q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias),
        dict(q_shift=q_shift, k_shift=k_shift), positions, grid, sizes, order, eps, segments,
    )  # fmt: skip
    if backend.is_reference(NAME, qkv):
        return *_reference(q, k, *checked), v
    if torch.compiler.is_compiling() or is_plain():
        return *_call(q, k, *checked), v
    return tuple(_Packed.apply(qkv, *checked))


def _reference(
    q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift,
    positions, divisor, divisors, eps, cu, max_length,
):  # fmt: skip
    segments = None if cu is None else Segments(cu, max_length)
    if divisors is not None:
        positions = reference.token_positions(q, divisors, segments)
    elif positions is None and divisor:
        positions = reference.token_positions(q, divisor, segments)
    tables = None if positions is None else reference.rope_tables(positions, q.shape[-1])
    q = reference.norm_rope(q, q_weight, q_bias, tables, q_shift, eps, segments)
    if k is not None:
        k = reference.norm_rope(k, k_weight, k_bias, tables, k_shift, eps, segments)
    return q, k
