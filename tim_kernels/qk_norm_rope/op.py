"""QK-norm with axial RoPE: operators, derivatives and public functions."""

import torch
from torch import Tensor

from ..checks import check_cond, check_same_device, check_tokens, is_double
from ..dispatch.backend import Op
from ..dispatch.operators import Derivative, Operator, can_differentiate
from ..segments import Segments, packing
from . import cpu, reference
from .positions import check_positions, period_of, periods_of


def _kernels(backend: str):
    if backend == "cuda":
        from . import cuda as kernels
    else:
        from . import triton as kernels
    return kernels


OP = Op("qk_norm_rope", _kernels)
_TAIL = (
    "Tensor? positions, SymInt[]? grid, Tensor? sizes, str order, float eps, "
    "Tensor? cu_seqlens, SymInt max_length"
)


def _forward_fake(q, k, *_):
    return q.new_empty(q.shape), q.new_empty(0) if k is None else k.new_empty(k.shape)


def _sums(q, q_weight, k_weight, q_shift, k_shift, *tail) -> tuple[Tensor, Tensor]:
    cu, (H, D) = tail[-2], q.shape[-2:]
    samples = q.shape[0] if cu is None else cu.shape[0] - 1
    is_shifted = q_shift is not None or k_shift is not None
    shifts = q.new_empty((2, samples if is_shifted else 0, H * D), dtype=torch.float32)
    return shifts, q.new_empty((4, D), dtype=torch.float32)


def _backward_fake(dq_out, dk_out, q, k, *args):
    dq = q.new_empty(0 if dq_out is None else q.shape)
    dk = q.new_empty(0) if dk_out is None else k.new_empty(k.shape)
    return dq, dk, *_sums(q, *args)


def _packed_backward_fake(dq_out, dk_out, dv, qkv, *args):
    return qkv.new_empty(qkv.shape), *_sums(qkv.select(-3, 0), *args)


forward_op = Operator(
    OP,
    "qk_norm_rope(Tensor q, Tensor? k, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, "
    f"Tensor? k_bias, Tensor? q_shift, Tensor? k_shift, {_TAIL}) -> (Tensor, Tensor)",
    _forward_fake,
)
backward_op = Operator(
    OP,
    "qk_norm_rope_backward(Tensor? dq_out, Tensor? dk_out, Tensor q, Tensor? k, Tensor? q_weight, "
    f"Tensor? k_weight, Tensor? q_shift, Tensor? k_shift, {_TAIL}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
packed_backward_op = Operator(
    OP,
    "qk_norm_rope_packed_backward(Tensor? dq_out, Tensor? dk_out, Tensor? dv, Tensor qkv, "
    f"Tensor? q_weight, Tensor? k_weight, Tensor? q_shift, Tensor? k_shift, {_TAIL}) "
    "-> (Tensor, Tensor, Tensor)",
    _packed_backward_fake,
)
jvp_op = Operator(
    OP,
    "qk_norm_rope_jvp(Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor? q_shift, "
    "Tensor? k_shift, Tensor? tq, Tensor? tk, Tensor? tq_weight, Tensor? tq_bias, "
    f"Tensor? tk_weight, Tensor? tk_bias, Tensor? tq_shift, Tensor? tk_shift, {_TAIL}) "
    "-> (Tensor, Tensor)",
    _forward_fake,
)


def _setup_context(ctx, inputs, output):
    q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift = inputs[:8]
    positions, grid, sizes, order, eps, cu, max_length = inputs[8:]
    saved = q, k, q_weight, k_weight, q_shift, k_shift, positions, sizes, cu
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.grid, ctx.order, ctx.eps, ctx.max_length = grid, order, eps, max_length
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[2:8]]
    ctx.leading = [None if x is None else x.shape[0] for x in (q_shift, k_shift)]


def _saved(ctx):
    """The tokens (q and k, or qkv and None), then weights and shifts, then the operators' tail."""
    *tokens_and_rows, positions, sizes, cu = ctx.saved_tensors
    tail = positions, ctx.grid, sizes, ctx.order, ctx.eps, cu, ctx.max_length
    return tokens_and_rows[:2], tokens_and_rows[2:], tail


def _vjp(ctx, dq_out, dk_out):
    (q, k), rows, tail = _saved(ctx)
    if k is None:
        dk_out = None
    dq, dk, *sums = backward_op(dq_out, dk_out, q, k, *rows, *tail)
    dq = None if dq_out is None else dq
    dk = None if dk_out is None else dk
    return dq, dk, *_row_gradients(ctx, *sums, dq_out, dk_out), *(None,) * 7


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


def _packed_setup_context(ctx, inputs, output):
    _setup_context(ctx, (inputs[0], None, *inputs[1:]), output)


def _packed_vjp(ctx, dq_out, dk_out, dv):
    (qkv, _), rows, tail = _saved(ctx)
    dqkv, *sums = packed_backward_op(dq_out, dk_out, dv, qkv, *rows, *tail)
    return dqkv, *_row_gradients(ctx, *sums, dq_out, dk_out), *(None,) * 7


def _packed_tangent(ctx, tqkv, *tangents):
    (qkv, _), rows, tail = _saved(ctx)
    q, k, v = qkv.unbind(-3)
    if tqkv is None:
        tq, tk, tv = None, None, torch.zeros_like(v)  # functorch wants a tangent of a view
    else:
        tq, tk, tv = tqkv.unbind(-3)
    return *jvp_op(q, k, *rows, tq, tk, *tangents[:6], *tail), tv


def _check(
    q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift,
    positions, grid, sizes, order, eps, cu, max_length,
) -> bool:  # fmt: skip
    samples = check_tokens("q", q, cu, max_length)
    check_same_device("q", q, q)
    layout = "(B, N, heads, head_dim)" if cu is None else "(T, heads, head_dim)"
    if q.ndim != layout.count(",") + 1:
        raise ValueError(f"q must be {layout}, got {tuple(q.shape)}")
    if k is not None:
        check_same_device("k", k, q)
        if k.shape != q.shape:
            raise ValueError(f"k must be shaped as q, {tuple(q.shape)}; got {tuple(k.shape)}")
    H, D = q.shape[-2:]
    affine = dict(q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias)
    shifts = dict(q_shift=q_shift, k_shift=k_shift)
    for name, row in (affine | shifts).items():
        if row is None:
            continue
        if name[0] == "k" and k is None:
            raise ValueError(f"{name} is given, but no k")
        if name in shifts:
            check_cond(name, row, samples, H * D, q)
            continue
        check_same_device(name, row, q)
        if row.shape != (D,):
            raise ValueError(f"{name} must be ({D},), got {tuple(row.shape)}")
        if affine[f"{name[0]}_weight"] is None:
            raise ValueError(f"{name} is given, but no {name[0]}_weight: the norm needs a weight")
    check_positions(q, samples, positions, grid, sizes, order, cu is not None)
    return is_double(q, k)


def _reference(
    q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift,
    positions, grid, sizes, order, eps, cu, max_length,
):  # fmt: skip
    segments = None if cu is None else Segments(cu, max_length)
    if sizes is not None:
        positions = reference.token_positions(q, periods_of(sizes, order), segments)
    elif grid is not None:
        positions = reference.token_positions(q, period_of(grid, order), segments)
    tables = None if positions is None else reference.rope_tables(positions, q.shape[-1])
    q = reference.norm_rope(q, q_weight, q_bias, tables, q_shift, eps, segments)
    if k is not None:
        k = reference.norm_rope(k, k_weight, k_bias, tables, k_shift, eps, segments)
    return q, k


def _on_cpu(
    q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift,
    positions, grid, sizes, order, eps, cu, max_length,
):  # fmt: skip
    if positions is not None or sizes is not None or cu is not None or is_double(q, k):
        return _reference(
            q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift,
            positions, grid, sizes, order, eps, cu, max_length,
        )  # fmt: skip
    q = cpu.run(q, q_weight, q_bias, q_shift, grid, order, eps)
    return q, None if k is None else cpu.run(k, k_weight, k_bias, k_shift, grid, order, eps)


_call = forward_op.differentiable(_check, _reference, _setup_context, _vjp, _tangent, _on_cpu)
# The same of a packed qkv in eager code: v is a view, and backward fills one dqkv. An operator may
# not return a view, so torch.compile gets `_call` on views instead.
_packed = Derivative("qkv_norm_rope", _packed_setup_context, _packed_vjp, _packed_tangent)


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
    q_out, k_out = _call(
        q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift, positions, _pair(grid), sizes,
        order, float(eps), *packing(segments),
    )  # fmt: skip
    return q_out if k is None else (q_out, k_out)


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
    rows = q_weight, q_bias, k_weight, k_bias, q_shift, k_shift
    args = *rows, positions, _pair(grid), sizes, order, float(eps), *packing(segments)
    if torch.compiler.is_compiling():
        return *_call(q, k, *args), v
    planned = forward_op.planned((q, k, *args))
    if planned.run is None or not can_differentiate((qkv, *rows)):
        return *planned.call(q, k, *args), v

    def run(qkv, *args):
        return *planned.run(qkv.select(-3, 0), qkv.select(-3, 1), *args), qkv.select(-3, 2)

    return tuple(_packed(run, qkv, *args))


def _pair(grid) -> tuple[int, int] | None:
    return None if grid is None else tuple(grid)
