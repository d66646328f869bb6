"""QK-norm with axial RoPE: operators, derivatives and public functions."""

from functools import partial
from typing import overload

import torch
from torch import Tensor

from ..checks import check_channels, check_cond, check_same_device, check_tokens, is_double
from ..dispatch.backend import Op, requested
from ..dispatch.operators import Derivative, Operator, Planned
from ..dispatch.torch_private import dispatch_modes, is_mapped
from ..launch.plans import Plans, signature
from ..names import RopeOrder
from ..segments import Segments, as_row, packing, unpacked
from . import cpu, cuda, reference
from .positions import check_positions, period_of, periods_of


def _triton():
    from . import triton

    return triton


OP = Op("qk_norm_rope", _triton, cuda)
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


def _vjp(args, needs, dq_out, dk_out):
    q, k, *rows = args[:8]
    dk_out = None if k is None else dk_out
    dq, dk, *sums = backward_op(dq_out, dk_out, q, k, *_without_biases(rows), *args[8:])
    of_rows = _of_rows(rows, *sums, dq_out, dk_out)
    return None if dq_out is None else dq, None if dk_out is None else dk, *of_rows


def _packed_vjp(args, needs, dq_out, dk_out, dv):
    qkv, *rows = args[:7]
    dqkv, *sums = packed_backward_op(dq_out, dk_out, dv, qkv, *_without_biases(rows), *args[7:])
    return dqkv, *_of_rows(rows, *sums, dq_out, dk_out)


def _without_biases(rows):
    q_weight, _, k_weight, _, q_shift, k_shift = rows
    return q_weight, k_weight, q_shift, k_shift


def _of_rows(rows, shifts: Tensor, affine: Tensor, dq_out, dk_out) -> list[Tensor | None]:
    """Gradients of the weights, biases and shifts in their own leading sizes and dtypes."""
    has_q, has_k = dq_out is not None, dk_out is not None
    is_made = has_q, has_q, has_k, has_k, has_q, has_k
    found = []
    for row, total, made in zip(rows, (*affine.unbind(0), *shifts.unbind(0)), is_made, strict=True):
        if row is not None and row.ndim == 2 and row.shape[0] == 1:
            total = total.sum(0, keepdim=True)
        found.append(total.to(row.dtype) if row is not None and made else None)
    return found


def _packed_jvp(args, tqkv, *tangents):
    qkv, *rest = args
    q, k, v = qkv.unbind(-3)
    if tqkv is None:
        tq, tk, tv = None, None, torch.zeros_like(v)  # functorch wants a tangent of a view
    else:
        tq, tk, tv = tqkv.unbind(-3)
    return *forward_op.jvp(q, k, *rest, tq, tk, *tangents[:6]), tv


def _check(
    q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift,
    positions, grid, sizes, order, eps, cu, max_length,
) -> bool:  # fmt: skip
    samples = check_tokens("q", q, cu)
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
        check_channels(name, row, D, q)
        if affine[f"{name[0]}_weight"] is None:
            raise ValueError(f"{name} is given, but no {name[0]}_weight: the norm needs a weight")
    check_positions(q, samples, positions, grid, sizes, order, cu is not None)
    return is_double(q, k)


def _reference(
    q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift,
    positions, grid, sizes, order, eps, cu, max_length,
):  # fmt: skip
    segments = unpacked(cu, max_length, q)
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


_call = forward_op.differentiable(8, _check, _reference, _vjp, _on_cpu)


def _slices(qkv, args) -> tuple[Tensor, Tensor, Tensor]:
    layout = "(B, N, 3, heads, head_dim)" if args[-2] is None else "(T, 3, heads, head_dim)"
    if qkv.ndim != layout.count(",") + 1 or qkv.shape[-3] != 3:
        raise ValueError(f"qkv must be {layout}, got {tuple(qkv.shape)}")
    return qkv.unbind(-3)


def _sliced(qkv, *args):
    q, k, v = _slices(qkv, args)
    return *_call(q, k, *args), v


# The same of a packed qkv in eager code: v is a view, and backward fills one dqkv. An operator may
# not return a view, so torch.compile and vmap get `_call` on views.
_packed = Derivative("qkv_norm_rope", _sliced, _packed_vjp, _packed_jvp)
_packed_runs = Plans()  # by signature, what computes it; None where the reference does


@overload
def qk_norm_rope(
    q: Tensor, k: None = None, q_weight: Tensor | None = None, q_bias: Tensor | None = None,
    k_weight: None = None, k_bias: None = None, *, positions: Tensor | None = None,
    grid: tuple[int, int] | None = None, sizes: Tensor | None = None,
    order: RopeOrder = "upstream", q_shift: Tensor | None = None, k_shift: None = None,
    eps: float = 1e-5, segments: Segments | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None = None, q_bias: Tensor | None = None,
    k_weight: Tensor | None = None, k_bias: Tensor | None = None, *,
    positions: Tensor | None = None, grid: tuple[int, int] | None = None,
    sizes: Tensor | None = None, order: RopeOrder = "upstream", q_shift: Tensor | None = None,
    k_shift: Tensor | None = None, eps: float = 1e-5, segments: Segments | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
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
    order: RopeOrder = "upstream",
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
        q_shift, k_shift: added before the norm, a row a sample, (B, heads·head_dim) or
            (B, 1, heads·head_dim), or one for all, (heads·head_dim,), (1, …) or (1, 1, …).
        eps: added to the variance.

    Returns q', or (q', k') if k is given: contiguous, in their inputs' dtypes, computed in
    float32 and rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, more than one source of positions,
            a rotated head_dim that is not a multiple of 4, an unknown order.

    Example:
        >>> q, k = torch.randn(2, 2, 12, 4, 32)  # 12 tokens of a 3×4 grid, 4 heads of 32 channels
        >>> weight, bias = torch.ones(32), torch.zeros(32)
        >>> q, k = qk_norm_rope(q, k, weight, bias, weight, bias, grid=(3, 4), order="grid")
    """
    q_shift, k_shift = as_row(q_shift, q, segments), as_row(k_shift, q, segments)
    q_out, k_out = _call(
        q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift, positions,
        grid if grid is None else tuple(grid), sizes, order, float(eps), *packing(segments, "q", q),
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
    order: RopeOrder = "upstream",
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

    Example:
        >>> qkv = torch.nn.Linear(128, 3 * 128)(torch.randn(2, 12, 128)).unflatten(-1, (3, 4, 32))
        >>> q, k, v = qkv_norm_rope(qkv, torch.ones(32), None, torch.ones(32), grid=(3, 4))
        >>> out = attention(q, k, v)
    """
    cu, max_length = packing(segments, "qkv", qkv)
    q_shift, k_shift = as_row(q_shift, qkv, segments), as_row(k_shift, qkv, segments)
    grid = grid if grid is None or type(grid) is tuple else tuple(grid)
    args = (
        q_weight, q_bias, k_weight, k_bias, q_shift, k_shift, positions, grid, sizes, order,
        float(eps), cu, max_length,
    )  # fmt: skip
    if torch.compiler.is_compiling() or is_mapped((qkv, *args)):
        return _sliced(qkv, *args)
    key = requested(), signature((qkv, *args))
    return _packed_runs.find(key, _packed_run, qkv, args)(qkv, *args)


def _packed_run(qkv, args):
    """What computes arguments like these."""
    q, k, _ = _slices(qkv, args)
    planned = forward_op.planned((q, k, *args))
    if planned.run is None:
        return _sliced

    def run(qkv, *args):
        q, k, v = qkv.unbind(-3)
        return *(planned.torch_op if dispatch_modes() else planned.run)(q, k, *args), v

    return partial(_packed, Planned((qkv, *args), None, run))
