"""Triton kernel of attention and its tangent: flash attention (arXiv 2205.14135) on dual numbers.

With scores s = scale·q·kᵀ, their tangent ds = scale·(tq·kᵀ + q·tkᵀ), and p = exp(s − max s), all
sums over the keys of a query,

    out  = Σ p·v / Σ p
    tout = (Σ w·v + Σ p·tv − out·Σ w) / Σ p,   w = p·(ds − centre)

for any `centre` that is one number a query. It is the mean of ds over the first tile of keys that a
query sees, so that what all keys share does not drown the rest when w is rounded. One pass over the
keys carries the sums, rescaled as the maximum grows; no other memory than the outputs. A query
without keys gets zeros. For a backward, log Σ exp s is kept too, ∞ where there is no key.
GROUP heads of queries in a row share one of keys and values; where the mask is CAUSAL a query has
no keys after its own place, and a tile of queries reads none after its last.

Products take p and w in the values' dtype and accumulate in float32. Σ p and Σ w are sums of the
rounded p and w, so that what all values share leaves no error; the tensor cores make them, as
products with ONES columns of ones, and p and w are rounded in pairs as nobody else looks at one.
float32 is multiplied as three products of TF32, which keeps its accuracy; plain multiply-adds
spill, or crash the compiler.

A head of D channels is kept as two pieces of A and B lanes: 72 = 64 + 16 half empty costs 80 lanes
of a product, where one piece would pay for 128. B is 0 where one piece wastes no more. Where q and
tq do not fit the registers they are read anew for each tile of keys, CHUNK channels at a time. In
the kernel m_i, l_i and alpha are online softmax's maximum, sum and rescaling, w_i is Σ w; qa, qb
are the two pieces of a tile, t tangents; what is None is compiled away. On sm_100
Triton waits for every product of a tile in turn, which leaves the tensor cores idle for most of it;
there, and in float32, ONES is 0 and Σ p and Σ w are not products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch.backend import interpreting
from ..launch.calls import Made, Out, like
from ..launch.grid import kernel, launch
from ..launch.rows import locate
from ..launch.shares import token_grid
from ..launch.tuning import configuration, has_tensor_memory
from ..launch.views import In, view_heads
from .backward import lse_shape

LOG2_E = tl.constexpr(1.4426950408889634)


@kernel
def _attention_jvp_kernel(
    cu_ptr, length, tiles,
    q_ptr, q_b, q_n, q_h, k_ptr, k_b, k_n, k_h, v_ptr, v_b, v_n, v_h,
    tq_ptr, tq_b, tq_n, tq_h, tk_ptr, tk_b, tk_n, tk_h, tv_ptr, tv_b, tv_n, tv_h,
    mask_ptr, k_cu_ptr, k_length, heads, scale, out_ptr, tout_ptr, lse_ptr, lse_n, lse_h,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, ONES: tl.constexpr, WIDEN: tl.constexpr, ALIGN: tl.constexpr,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    k_head = head // GROUP if GROUP > 1 else head
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    _, _, k_first, k_row, k_span = locate(k_cu_ptr, k_length, tiles)
    q = q_ptr, sample * q_b + first * q_n + head * q_h, q_n
    k = k_ptr, sample * k_b + k_first * k_n + k_head * k_h, k_n
    v = v_ptr, sample * v_b + k_first * v_n + k_head * v_h, v_n
    tq = tq_ptr, sample * tq_b + first * tq_n + head * tq_h, tq_n
    tk = tk_ptr, sample * tk_b + k_first * tk_n + k_head * tk_h, tk_n
    tv = tv_ptr, sample * tv_b + k_first * tv_n + k_head * tv_h, tv_n
    HAS_TQ: tl.constexpr = tq_ptr is not None
    HAS_DS: tl.constexpr = tq_ptr is not None or tk_ptr is not None

    n, key = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    is_row, unit = n < span, scale * LOG2_E  # exp(scale·s) = exp2(unit·s)
    if not CHUNK:
        qa = _load(q, n, is_row, 0, A, D, ALIGN)
        tqa = _load(tq, n, is_row, 0, A, D, ALIGN)
        if B:
            qb = _load(q, n, is_row, A, B, D, ALIGN)
            tqb = _load(tq, n, is_row, A, B, D, ALIGN)
    m_i = tl.full((ROWS,), float("-inf"), tl.float32)
    l_i = tl.zeros((ROWS, ONES) if ONES else (ROWS,), tl.float32)
    w_i = l_i
    centre = tl.zeros((ROWS,), tl.float32)
    oa, ta = tl.zeros((ROWS, A), tl.float32), tl.zeros((ROWS, A), tl.float32)
    if B:
        ob, tb = tl.zeros((ROWS, B), tl.float32), tl.zeros((ROWS, B), tl.float32)

    end = tl.minimum(k_span, (tile + 1) * ROWS) if CAUSAL else k_span
    end = tl.where(tile * ROWS < span, end, 0)  # no keys for a tile past a short sample's end
    for begin in range(0, end, COLUMNS):
        is_key = key < k_span - begin
        keys = begin + key, is_key
        s, ds = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
        if CHUNK:
            for c in range(0, D, CHUNK):
                qc = _load(q, n, is_row, c, CHUNK, D, ALIGN)
                tqc = _load(tq, n, is_row, c, CHUNK, D, ALIGN)
                s, ds = _scores(s, ds, qc, tqc, k, tk, keys, c, CHUNK, HAS_TQ, D, WIDEN, ALIGN)
        else:
            s, ds = _scores(s, ds, qa, tqa, k, tk, keys, 0, A, HAS_TQ, D, WIDEN, ALIGN)
            if B:
                s, ds = _scores(s, ds, qb, tqb, k, tk, keys, A, B, HAS_TQ, D, WIDEN, ALIGN)
        if mask_ptr is not None:
            is_key = is_key & (tl.load(mask_ptr + k_row + begin + key, is_key, 0) != 0)
        is_seen = is_key[None, :]
        if CAUSAL and mask_ptr is None:
            is_seen = key[None, :] <= (tl.minimum(n, k_span - 1) - begin)[:, None]
        elif CAUSAL:
            is_seen = is_seen & ((begin + key)[None, :] <= n[:, None])
        s = tl.where(is_seen, s, float("-inf"))

        before = m_i
        m_i = tl.maximum(before, tl.max(s, 1))
        reference = tl.where(m_i == float("-inf"), 0.0, -m_i * unit)  # no key yet
        alpha = tl.exp2(tl.fma(before, unit, reference))
        exact = tl.exp2(tl.fma(s, unit, reference[:, None]))
        p = exact.to(v_ptr.dtype.element_ty)
        w = p
        if HAS_DS:
            if mask_ptr is not None:  # a query's first key may be in any tile
                sums = tl.sum(exact, 1)
                mean = tl.sum(exact * ds, 1) * (scale / tl.where(sums == 0.0, 1.0, sums))
                centre = tl.where(before == float("-inf"), mean, centre)
            elif begin == 0:
                centre = tl.sum(exact * ds, 1) * (scale / tl.sum(exact, 1))
            w = (exact * tl.fma(ds, scale, -centre[:, None])).to(p.dtype)
            w_i = _sum(w_i, alpha, w, COLUMNS, ONES, WIDEN)
        l_i = _sum(l_i, alpha, p, COLUMNS, ONES, WIDEN)
        if B:  # before A: else each warp of a small tile computes all channels of A, and spills
            ob, tb = ob * alpha[:, None], tb * alpha[:, None]
            ob, tb = _values(ob, tb, p, w, v, tv, keys, A, B, HAS_DS, D, WIDEN, ALIGN)
        oa, ta = oa * alpha[:, None], ta * alpha[:, None]
        oa, ta = _values(oa, ta, p, w, v, tv, keys, 0, A, HAS_DS, D, WIDEN, ALIGN)

    if ONES:  # equal columns
        l_i, w_i = tl.max(l_i, 1), tl.max(w_i, 1)
    inverse = 1.0 / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    w_mean = w_i[:, None] * inverse
    if lse_ptr is not None:
        lse = tl.where(l_i == 0.0, float("inf"), m_i * scale + tl.log(l_i))
        tl.store(lse_ptr + first_out * lse_n + head * lse_h + n, lse, is_row)
    row = ((first_out + n) * heads + head) * D
    _store(out_ptr, row, is_row, oa * inverse, 0, A, D)
    _store(tout_ptr, row, is_row, (ta - oa * w_mean) * inverse, 0, A, D)
    if B:
        _store(out_ptr, row, is_row, ob * inverse, A, B, D)
        _store(tout_ptr, row, is_row, (tb - ob * w_mean) * inverse, A, B, D)


@triton.jit
def _load(
    view, row, is_row, channel, LANES: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """`row` (ROWS,) of a view (pointer, start, stride) as (ROWS, LANES), from a channel on, zeros
    past D; a single zero, not to be used, where there is no tensor."""
    ptr, start, stride = view
    if ptr is None:
        return tl.zeros((1, 1), tl.float32)
    else:
        offset = start * ALIGN + row * (tl.cast(stride, tl.int64) * ALIGN)
        column = channel + tl.arange(0, LANES)[None, :]
        return tl.load(ptr + offset[:, None] + column, is_row[:, None] & (column < D), 0.0)


@triton.jit
def _store(ptr, offset, is_row, x, channel, LANES: tl.constexpr, D: tl.constexpr):
    column = channel + tl.arange(0, LANES)[None, :]
    tl.store(ptr + offset[:, None] + column, x, is_row[:, None] & (column < D))


@triton.jit
def _scores(
    s, ds, q, tq, k, tk, keys, channel, LANES: tl.constexpr, HAS_TQ: tl.constexpr,
    D: tl.constexpr, WIDEN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """s + q·kᵀ and ds + tq·kᵀ + q·tkᵀ over LANES channels."""
    row, is_row = keys
    tk_ptr, _, _ = tk
    k = tl.trans(_load(k, row, is_row, channel, LANES, D, ALIGN))
    s = _dot(q, k, s, WIDEN)
    if HAS_TQ:
        ds = _dot(tq, k, ds, WIDEN)
    if tk_ptr is not None:
        ds = _dot(q, tl.trans(_load(tk, row, is_row, channel, LANES, D, ALIGN)), ds, WIDEN)
    return s, ds


@triton.jit
def _values(
    o, t, p, w, v, tv, keys, channel, LANES: tl.constexpr, HAS_DS: tl.constexpr, D: tl.constexpr,
    WIDEN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """o + p·v and t + w·v + p·tv over LANES channels."""
    row, is_row = keys
    tv_ptr, _, _ = tv
    v = _load(v, row, is_row, channel, LANES, D, ALIGN)
    o = _dot(p, v, o, WIDEN)
    if HAS_DS:
        t = _dot(w, v, t, WIDEN)
    if tv_ptr is not None:
        t = _dot(p, _load(tv, row, is_row, channel, LANES, D, ALIGN), t, WIDEN)
    return o, t


@triton.jit
def _sum(sums, alpha, x, COLUMNS: tl.constexpr, ONES: tl.constexpr, WIDEN: tl.constexpr):
    """sums·alpha + Σ x over the keys, (ROWS,), or ONES columns of it."""
    if ONES:
        ones = tl.full((COLUMNS, ONES), 1.0, tl.float32)  # Triton 3.6 interprets no bf16
        return _dot(x, ones.to(x.dtype), sums * alpha[:, None], WIDEN)
    else:
        return sums * alpha + tl.sum(x.to(tl.float32), 1)


@triton.jit
def _dot(x, y, sums, WIDEN: tl.constexpr):
    """sums + x·y, accumulated in float32."""
    if WIDEN:  # Triton's interpreter cannot multiply bfloat16
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, sums, input_precision="tf32x3")


def pieces(head_dim: int) -> tuple[int, int]:
    """(A, B): lanes of a head, A + B ≥ head_dim; the hardware's least is 16, B = 0 is one piece.

    72 → (64, 16), 64 → (64, 0), 120 → (128, 0).
    """
    whole = max(16, triton.next_power_of_2(head_dim))
    half = whole // 2
    rest = max(16, triton.next_power_of_2(head_dim - half))
    return (whole, 0) if half + rest >= whole else (half, rest)


def _tile(q: Tensor, lanes: int) -> dict[str, int]:
    """Queries (rows), keys (columns) and channels (chunk, 0 for all) of a tile, and its warps."""
    is_float32 = q.dtype == torch.float32
    kind = "attention.jvp.float32" if is_float32 else "attention.jvp"
    sizes = (80, 96, 128, 256) if is_float32 else (64, 80, 96, 128, 256)
    name = f"{kind}.{next(n for n in sizes if lanes <= n)}"
    return configuration(name, q.device)


def _ones(q: Tensor) -> int:
    """Columns of ones, the hardware's least; 0 where sums are not products."""
    return 0 if q.dtype == torch.float32 or has_tensor_memory(q.device) else 8


def jvp(
    q, k, v, tq, tk, tv, key_mask, cu, k_cu, max_length, k_max_length, scale=None, causal=False,
    has_lse=False,
):  # fmt: skip
    """(out, tout, lse), out and tout shaped as q and contiguous; a tangent that is None is zero.
    lse is float32 (B, heads, N), packed (heads, T), or empty unless `has_lse`."""
    args = q, k, v, tq, tk, tv, key_mask, cu, k_cu
    is_packed, (heads, D) = cu is not None, q.shape[-2:]
    A, B = pieces(D)
    tile = _tile(q, A + B)
    programs, length, tiles = token_grid(q, cu, max_length, tile["rows"])
    mask = In(6, change=lambda mask: mask.contiguous().view(torch.uint8))
    lse = Made(lse_shape(q), torch.float32) if has_lse else None
    return launch(
        _attention_jvp_kernel, (programs, heads),
        (In(7), length, tiles, *view_heads(args, *range(6), is_packed=is_packed), mask, In(8),
         k_max_length if is_packed else k.shape[1], heads, scale or D**-0.5, Out(0), Out(1),
         Out(2), 1 if is_packed else heads, q.shape[-3]),
        (like(q), like(q), lse), args, D=D, A=A, B=B, ROWS=tile["rows"], COLUMNS=tile["columns"],
        CHUNK=tile["chunk"], ONES=_ones(q), WIDEN=interpreting() and q.dtype == torch.bfloat16,
        GROUP=heads // max(1, k.shape[-2]), CAUSAL=causal,
        num_warps=tile["num_warps"], num_stages=tile["num_stages"],
    )  # fmt: skip
