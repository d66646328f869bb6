"""Triton kernels of QK-norm and axial RoPE for queries and keys in one launch.

Per token and head, for q and for k if there is one:

    y = RoPE(LN(x + shift)·weight + bias)      each part left out when its tensor is None

A tile is T tokens × HB heads, flattened to rows of D channels in the chunks of lanes.py, so that
head_dim 72 costs 64 + 8 channels, of which four threads have 18 each; pieces are even and no pair
straddles them. The angles of a token are formed once and shared by all heads of a tile, in forward
and tangent by q and k as well (backward takes q and k in turn, for half the registers). Pairs are
taken apart by tl.reshape and tl.split, which is renaming of registers where a thread holds whole
pairs.

LayerNorm statistics are recomputed in backward and tangent, as the rows are in registers anyway.
In backward each thread keeps its rows' sums over the tokens in registers, and a program has
columns of HB heads; sums over programs are torch.sum's. It copies the rows of two trips ahead into
shared memory, and has weights and shifts from there too, which leaves registers for the sums.

In the kernels xa, xb are the two pieces of a row, g gradients, t tangents, and `turn` is
(cos, sin, cos, sin) of the pairs of the two pieces.
"""

import torch
import triton.language as tl

from ..launch.calls import Made, Out, like
from ..launch.grid import kernel, launch
from ..launch.lanes import chunks
from ..launch.rows import locate, pieces
from ..launch.shares import samples_and_length, token_grid, tokens_to_reduce
from ..launch.tuning import has_tensor_memory, tuned
from ..launch.views import In, contiguous_strides, view_cond, view_heads, view_vectors
from .frequencies import frequencies
from .gradients import QKV, as_backward, filled, of_qkv, slot
from .heads import backward_heads, forward_heads, jvp_heads, load_heads, load_shift, load_weight
from .positions import is_rotated, period_of, periods_of
from .rotation import axial_turn, load_frequencies


@kernel
def _qk_norm_rope_forward_kernel(
    cu_ptr, length, tiles, q_ptr, q_b, q_n, q_h, k_ptr, k_b, k_n, k_h,
    q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,
    q_shift_ptr, q_shift_s, k_shift_ptr, k_shift_s,
    position_ptr, position_b, period, periods_ptr, periods_s, freq_ptr,
    q_out_ptr, k_out_ptr, eps, H: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    P: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr, HB: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    positions = position_ptr, position_b, period, periods_ptr, periods_s, freq_ptr
    q, q_shift = (q_ptr, q_b, q_n, q_h), (q_shift_ptr, q_shift_s)
    k, k_shift = (k_ptr, k_b, k_n, k_h), (k_shift_ptr, k_shift_s)
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    n = tile * T + tl.arange(0, T)
    frequencies = load_frequencies(freq_ptr, D, K, P, B)
    turn = axial_turn(frequencies, positions, sample, first, n, n < span)
    row = tl.arange(0, T * HB)
    token, begin = row // HB, tile * T
    for head in range(0, H, HB):
        at = sample, first + begin, first_out + begin, token, head + row % HB, begin + token < span
        # all loads before the first use
        q_rows = load_heads(q, at, D, K, P, B, ALIGN)
        q_row = load_shift(q_shift, at, D, K, P, B, ALIGN)
        q_weight = load_weight(q_weight_ptr, at, D, K, P, B)
        q_bias = load_weight(q_bias_ptr, at, D, K, P, B)
        k_rows = load_heads(k, at, D, K, P, B, ALIGN)
        k_row = load_shift(k_shift, at, D, K, P, B, ALIGN)
        k_weight = load_weight(k_weight_ptr, at, D, K, P, B)
        k_bias = load_weight(k_bias_ptr, at, D, K, P, B)
        forward_heads(
            q_rows, q_row, q_weight, q_bias, eps, turn, q_out_ptr, at, H, D, K, P, B, LANES, T
        )
        if k_ptr is not None:
            forward_heads(
                k_rows, k_row, k_weight, k_bias, eps, turn, k_out_ptr, at, H, D, K, P, B, LANES, T
            )


@kernel
def _qk_norm_rope_backward_kernel(
    cu_ptr, length, tiles, tokens_per_program,
    dq_out_ptr, dq_out_b, dq_out_n, dq_out_h, dk_out_ptr, dk_out_b, dk_out_n, dk_out_h,
    q_ptr, q_b, q_n, q_h, k_ptr, k_b, k_n, k_h, q_weight_ptr, k_weight_ptr,
    q_shift_ptr, q_shift_s, k_shift_ptr, k_shift_s,
    position_ptr, position_b, period, periods_ptr, periods_s, freq_ptr,
    dq_ptr, dq_b, dq_n, dq_h, dk_ptr, dk_b, dk_n, dk_h,
    q_dshift_ptr, k_dshift_ptr, q_affine_ptr, k_affine_ptr, step, eps,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
    LANES: tl.constexpr, T: tl.constexpr, HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    positions = position_ptr, position_b, period, periods_ptr, periods_s, freq_ptr
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    stop = min((tile + 1) * tokens_per_program, span)
    tokens = sample, first, first_out, tile * tokens_per_program, stop
    if dq_out_ptr is not None:
        backward_heads(
            (dq_out_ptr, dq_out_b, dq_out_n, dq_out_h), (q_ptr, q_b, q_n, q_h),
            (q_shift_ptr, q_shift_s), (q_weight_ptr, eps), positions, (dq_ptr, dq_b, dq_n, dq_h),
            q_dshift_ptr, q_affine_ptr, step, tokens,
            H, D, K, P, B, LANES, T, HB, ALIGN,
        )  # fmt: skip
    if dk_out_ptr is not None:
        backward_heads(
            (dk_out_ptr, dk_out_b, dk_out_n, dk_out_h), (k_ptr, k_b, k_n, k_h),
            (k_shift_ptr, k_shift_s), (k_weight_ptr, eps), positions, (dk_ptr, dk_b, dk_n, dk_h),
            k_dshift_ptr, k_affine_ptr, step, tokens,
            H, D, K, P, B, LANES, T, HB, ALIGN,
        )  # fmt: skip


@kernel
def _qk_norm_rope_jvp_kernel(
    cu_ptr, length, tiles, q_ptr, q_b, q_n, q_h, k_ptr, k_b, k_n, k_h,
    q_weight_ptr, k_weight_ptr, q_shift_ptr, q_shift_s, k_shift_ptr, k_shift_s,
    tq_ptr, tq_b, tq_n, tq_h, tk_ptr, tk_b, tk_n, tk_h,
    tq_weight_ptr, tq_bias_ptr, tk_weight_ptr, tk_bias_ptr,
    tq_shift_ptr, tq_shift_s, tk_shift_ptr, tk_shift_s,
    position_ptr, position_b, period, periods_ptr, periods_s, freq_ptr,
    tq_out_ptr, tk_out_ptr, eps, H: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    P: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr, HB: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    positions = position_ptr, position_b, period, periods_ptr, periods_s, freq_ptr
    q, q_shift = (q_ptr, q_b, q_n, q_h), (q_shift_ptr, q_shift_s)
    k, k_shift = (k_ptr, k_b, k_n, k_h), (k_shift_ptr, k_shift_s)
    tq, tq_shift = (tq_ptr, tq_b, tq_n, tq_h), (tq_shift_ptr, tq_shift_s)
    tk, tk_shift = (tk_ptr, tk_b, tk_n, tk_h), (tk_shift_ptr, tk_shift_s)
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    n = tile * T + tl.arange(0, T)
    frequencies = load_frequencies(freq_ptr, D, K, P, B)
    turn = axial_turn(frequencies, positions, sample, first, n, n < span)
    row = tl.arange(0, T * HB)
    token, begin = row // HB, tile * T
    for head in range(0, H, HB):
        at = sample, first + begin, first_out + begin, token, head + row % HB, begin + token < span
        # what only these rows have first
        q_rows = load_heads(q, at, D, K, P, B, ALIGN)
        tq_rows = load_heads(tq, at, D, K, P, B, ALIGN)
        k_rows = load_heads(k, at, D, K, P, B, ALIGN)
        tk_rows = load_heads(tk, at, D, K, P, B, ALIGN)
        jvp_heads(
            q_rows, load_shift(q_shift, at, D, K, P, B, ALIGN),
            load_weight(q_weight_ptr, at, D, K, P, B),
            tq_rows, load_shift(tq_shift, at, D, K, P, B, ALIGN),
            load_weight(tq_weight_ptr, at, D, K, P, B), load_weight(tq_bias_ptr, at, D, K, P, B),
            eps, turn, tq_out_ptr, at, H, D, K, P, B, LANES, T,
        )  # fmt: skip
        if k_ptr is not None:
            jvp_heads(
                k_rows, load_shift(k_shift, at, D, K, P, B, ALIGN),
                load_weight(k_weight_ptr, at, D, K, P, B),
                tk_rows, load_shift(tk_shift, at, D, K, P, B, ALIGN),
                load_weight(tk_weight_ptr, at, D, K, P, B),
                load_weight(tk_bias_ptr, at, D, K, P, B),
                eps, turn, tk_out_ptr, at, H, D, K, P, B, LANES, T,
            )  # fmt: skip


def _tile(direction: str, q, k) -> dict[str, int]:
    """The constants of a kernel over tiles of tokens × heads."""
    elements, num_warps = tuned(f"qk_norm_rope.{direction}", q.device)
    if direction == "forward":  # tuned for what q and k of two bytes take of the registers
        if k is None:
            num_warps = max(1, num_warps // 2)
        elif q.element_size() > 2:
            num_warps = max(2, num_warps)
    H, D = q.shape[-2:]
    rows = 2 ** min(6, max(0, (elements // sum(pieces(D))).bit_length() - 1))
    HB = min(H & -H, 16, rows)  # the heads of a tile: a power of two that divides H
    tile = dict(H=H, D=D, **chunks(D, q.element_size()), T=rows // HB, HB=HB, num_warps=num_warps)
    a_thread = rows * sum(pieces(D)) / (32 * num_warps)
    return tile | dict(maxnreg=_most_registers(direction, q, k, a_thread))


def _most_registers(direction: str, q, k, a_thread: float) -> int | None:
    """Of a thread that has `a_thread` channels of q; by themselves compilers take more, or fewer
    and spill. 128 let a multiprocessor hold 16 warps, 168 let it hold 12."""
    is_float = q.element_size() == 4
    if a_thread > (36 if direction == "forward" else 18):
        return None
    if is_float and (direction == "jvp" or (direction == "forward" and k is None)):
        return 168
    if k is None or direction == "forward":
        return None
    if direction == "jvp":
        return 128
    if has_tensor_memory(q.device):  # as Triton 3.6 and 3.8 need
        return 176 if not is_float else 184 if a_thread <= 16 else None
    return None if is_float else 168


def _positions(args: tuple, first: int) -> list:
    """The kernels' arguments from position_ptr to freq_ptr; positions are argument `first`."""
    positions, grid, sizes, order = args[first : first + 4]
    position_b = 0 if positions is None or positions.ndim == 2 else 2 * positions.shape[1]
    period_s = 0 if sizes is None else sizes.stride(0)
    periods = In(first + 2, change=lambda sizes: periods_of(sizes, order))
    freq = None
    if is_rotated(positions, grid, sizes):
        q = next(x for x in args if x is not None)
        freq = frequencies(q.shape[-1], q.device)
    where = *view_vectors(args, first), position_b, period_of(grid, order)
    return [*where, periods, period_s, freq]


def forward(*args):
    """(q', k'), an empty tensor for k' if there is no k."""
    q, k, *_, eps, cu, max_length = args
    tile = _tile("forward", q, k)
    programs, length, tiles = token_grid(q, cu, max_length, tile["T"])
    return launch(
        _qk_norm_rope_forward_kernel, (programs,),
        (In(13), length, tiles, *view_heads(args, 0, 1, is_packed=cu is not None),
         *view_vectors(args, 2, 3, 4, 5), *view_cond(args, 6, 7), *_positions(args, 8),
         Out(0), Out(1), eps),
        (like(q), like(k)), args, **tile,
    )  # fmt: skip


def _backward(args: tuple, q_and_k: list[In], targets: list, made: tuple, of: tuple):
    """Of a call with arguments `of`, like `args` of `backward`: fill `targets`, dq and dk, each a
    pointer and three strides, which are of those `made`. The sums of the rows' gradients come last:
    shifts (2, samples, heads·head_dim) for q and k, affine (4, head_dim) for q's weight and bias
    and k's, both float32. What nobody asked for is empty or unset."""
    _, _, q, k, q_weight, k_weight, q_shift, k_shift, *_, eps, cu, max_length = args
    (H, D), tile, is_packed = q.shape[-2:], _tile("backward", q, k), cu is not None
    columns = H // tile["HB"]
    tokens = tokens_to_reduce(q, cu, max_length, tile["num_warps"], tile["T"], columns)
    programs, length, tiles = token_grid(q, cu, max_length, tokens)
    samples, _ = samples_and_length(q, cu, max_length)
    is_shifted = q_shift is not None or k_shift is not None
    is_normed = q_weight is not None or k_weight is not None
    shifts = Made((2, samples, tiles, H * D) if is_shifted else (2, 0, 0, H * D), torch.float32)
    affine = Made((4, programs * columns if is_normed else 0, D), torch.float32)
    of_shift, of_affine = len(made), len(made) + 1
    sums = (
        Out(of_shift, (), lambda x: x[0]), Out(of_shift, (), lambda x: x[1]),
        Out(of_affine, (), lambda x: x[:2]), Out(of_affine, (), lambda x: x[2:]),
    )  # fmt: skip
    return launch(
        _qk_norm_rope_backward_kernel, (programs, columns),
        (In(13), length, tiles, tokens, *view_heads(args, 0, 1, is_packed=is_packed), *q_and_k,
         *view_vectors(args, 4, 5), *view_cond(args, 6, 7), *_positions(args, 8), *targets, *sums,
         programs, eps),
        (*made, shifts, affine), of,
        finish=lambda *made: (*made[:-2], made[-2].sum(2), made[-1].sum(1)), **tile,
    )  # fmt: skip


def _by_token(strides: tuple[int, ...], is_packed: bool) -> tuple[int, ...]:
    return (0, *strides[:2]) if is_packed else strides[:3]


def backward(*args):
    """(dq, dk, shifts, affine), empty those of dq and dk whose gradient does not exist."""
    dq_out, dk_out, q, k, *_, cu, _ = args
    strides = _by_token(contiguous_strides(q.shape), cu is not None)
    targets = [
        n for i in (0, 1) for n in ((None, 0, 0, 0) if args[i] is None else (Out(i, strides),))
    ]
    q_and_k = view_heads(args, 2, 3, is_packed=cu is not None)
    return _backward(args, q_and_k, targets, (like(q, dq_out), like(k, dk_out)), args)


def packed_backward(*args):
    """(dqkv, shifts, affine)."""
    is_packed, qkv = args[-2] is not None, args[QKV]
    of_dqkv = contiguous_strides(qkv.shape)
    strides = _by_token(of_dqkv[:-3] + of_dqkv[-2:], is_packed)
    targets = [
        n for i in (0, 1) for n in ((None, 0, 0, 0) if args[i] is None else (slot(strides, i),))
    ]
    plain = as_backward(args)
    views = view_heads(plain, 2, 3, is_packed=is_packed)
    q_and_k = [of_qkv(view, which) for which, view in enumerate(views)]
    return filled(_backward(plain, q_and_k, targets, (like(qkv),), args))


def jvp(*args):
    """Tangents of (q', k'); a tangent that is None is zero."""
    q, k, *_, eps, cu, max_length = args[:15]
    tile, is_packed = _tile("jvp", q, k), cu is not None
    programs, length, tiles = token_grid(q, cu, max_length, tile["T"])
    return launch(
        _qk_norm_rope_jvp_kernel, (programs,),
        (In(13), length, tiles, *view_heads(args, 0, 1, is_packed=is_packed),
         *view_vectors(args, 2, 4), *view_cond(args, 6, 7),
         *view_heads(args, 15, 16, is_packed=is_packed), *view_vectors(args, 17, 18, 19, 20),
         *view_cond(args, 21, 22), *_positions(args, 8), Out(0), Out(1), eps),
        (like(q), like(k)), args, **tile,
    )  # fmt: skip
