"""Triton kernels of QK-norm and axial RoPE for queries and keys in one launch.

Per token and head, for q and for k if there is one:

    y = RoPE(LN(x + shift)·weight + bias)      each part left out when its tensor is None

A tile is T tokens × HB heads, flattened to rows of D channels in two power-of-two pieces (rows.py),
so that head_dim 72 costs 64 + 8 lanes; both pieces are even and no pair straddles them. The angles
of a token are formed once, as (T, pairs), and shared by all heads of a tile, in forward and tangent
by q and k as well (backward takes q and k in turn, for half the registers). Pairs are taken apart
by tl.reshape and tl.split, which is renaming of registers where a thread holds whole pairs: 928
instructions of a forward at head_dim 72, against 1216 with partners swapped by an exclusive-or
reduction.

LayerNorm statistics are recomputed in backward and tangent, as the rows are in registers anyway.
In backward each thread keeps its rows' sums over the tokens in registers, and a program has
columns of HB heads; sums over programs are torch.sum's.

In the kernels xa, xb are the two pieces of a row, g gradients, t tangents, and `turn` is
(cos, sin, cos, sin) of the pairs of the two pieces.
"""

import torch
import triton.language as tl

from ..launch.grid import Launch, kernel
from ..launch.rows import locate, pieces
from ..launch.shares import samples_and_length, token_grid, tokens_to_reduce
from ..launch.tuning import tuned
from ..launch.views import POINTER, view_cond, view_heads, view_vector
from .frequencies import frequencies
from .gradients import packed, separate
from .heads import backward_heads, forward_heads, jvp_heads, locate_tokens
from .positions import is_rotated, period_of, periods_of
from .rotation import axial_turn


@kernel
def _qk_norm_rope_forward_kernel(
    cu_ptr, length, tiles, q_ptr, q_b, q_n, q_h, k_ptr, k_b, k_n, k_h,
    q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,
    q_shift_ptr, q_shift_s, k_shift_ptr, k_shift_s,
    position_ptr, position_b, period, periods_ptr, periods_s, freq_ptr,
    q_out_ptr, k_out_ptr, eps, H: tl.constexpr, D: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, T: tl.constexpr, HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    positions = position_ptr, position_b, period, periods_ptr, periods_s, freq_ptr
    q, q_shift = (q_ptr, q_b, q_n, q_h), (q_shift_ptr, q_shift_s)
    k, k_shift = (k_ptr, k_b, k_n, k_h), (k_shift_ptr, k_shift_s)
    q_norm, k_norm = (q_weight_ptr, q_bias_ptr, eps), (k_weight_ptr, k_bias_ptr, eps)
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    n, row, row_out, is_row = locate_tokens(first, first_out, tile * T, span, T, HB)
    if freq_ptr is None:
        turn = None
    else:
        turn = axial_turn(positions, sample, first, n, n < span, D, A, B, ALIGN)
    for begin in range(0, H, HB):
        at = sample, row, row_out, begin + tl.arange(0, T * HB) % HB, is_row
        forward_heads(q, q_shift, q_norm, turn, q_out_ptr, at, H, D, A, B, T, HB, ALIGN)
        if k_ptr is not None:
            forward_heads(k, k_shift, k_norm, turn, k_out_ptr, at, H, D, A, B, T, HB, ALIGN)


@kernel
def _qk_norm_rope_backward_kernel(
    cu_ptr, length, tiles, tokens_per_program,
    dq_out_ptr, dq_out_b, dq_out_n, dq_out_h, dk_out_ptr, dk_out_b, dk_out_n, dk_out_h,
    q_ptr, q_b, q_n, q_h, k_ptr, k_b, k_n, k_h, q_weight_ptr, k_weight_ptr,
    q_shift_ptr, q_shift_s, k_shift_ptr, k_shift_s,
    position_ptr, position_b, period, periods_ptr, periods_s, freq_ptr,
    dq_ptr, dq_b, dq_n, dq_h, dk_ptr, dk_b, dk_n, dk_h,
    q_dshift_ptr, k_dshift_ptr, q_affine_ptr, k_affine_ptr, step, eps,
    H: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
    HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    positions = position_ptr, position_b, period, periods_ptr, periods_s, freq_ptr
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    stop = min((tile + 1) * tokens_per_program, span)
    tokens = sample, first, first_out, tile * tokens_per_program, stop
    if dq_out_ptr is not None:
        backward_heads(
            (dq_out_ptr, dq_out_b, dq_out_n, dq_out_h), (q_ptr, q_b, q_n, q_h),
            (q_shift_ptr, q_shift_s), (q_weight_ptr, eps), positions, (dq_ptr, dq_b, dq_n, dq_h),
            q_dshift_ptr, q_affine_ptr, step, tokens, H, D, A, B, T, HB, ALIGN,
        )  # fmt: skip
    if dk_out_ptr is not None:
        backward_heads(
            (dk_out_ptr, dk_out_b, dk_out_n, dk_out_h), (k_ptr, k_b, k_n, k_h),
            (k_shift_ptr, k_shift_s), (k_weight_ptr, eps), positions, (dk_ptr, dk_b, dk_n, dk_h),
            k_dshift_ptr, k_affine_ptr, step, tokens, H, D, A, B, T, HB, ALIGN,
        )  # fmt: skip


@kernel
def _qk_norm_rope_jvp_kernel(
    cu_ptr, length, tiles, q_ptr, q_b, q_n, q_h, k_ptr, k_b, k_n, k_h,
    q_weight_ptr, k_weight_ptr, q_shift_ptr, q_shift_s, k_shift_ptr, k_shift_s,
    tq_ptr, tq_b, tq_n, tq_h, tk_ptr, tk_b, tk_n, tk_h,
    tq_weight_ptr, tq_bias_ptr, tk_weight_ptr, tk_bias_ptr,
    tq_shift_ptr, tq_shift_s, tk_shift_ptr, tk_shift_s,
    position_ptr, position_b, period, periods_ptr, periods_s, freq_ptr,
    tq_out_ptr, tk_out_ptr, eps, H: tl.constexpr, D: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, T: tl.constexpr, HB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    positions = position_ptr, position_b, period, periods_ptr, periods_s, freq_ptr
    q, q_shift, q_norm = (q_ptr, q_b, q_n, q_h), (q_shift_ptr, q_shift_s), (q_weight_ptr, eps)
    k, k_shift, k_norm = (k_ptr, k_b, k_n, k_h), (k_shift_ptr, k_shift_s), (k_weight_ptr, eps)
    tq, tq_shift = (tq_ptr, tq_b, tq_n, tq_h), (tq_shift_ptr, tq_shift_s)
    tk, tk_shift = (tk_ptr, tk_b, tk_n, tk_h), (tk_shift_ptr, tk_shift_s)
    tq_norm, tk_norm = (tq_weight_ptr, tq_bias_ptr), (tk_weight_ptr, tk_bias_ptr)
    sample, tile, first, first_out, span = locate(cu_ptr, length, tiles)
    n, row, row_out, is_row = locate_tokens(first, first_out, tile * T, span, T, HB)
    if freq_ptr is None:
        turn = None
    else:
        turn = axial_turn(positions, sample, first, n, n < span, D, A, B, ALIGN)
    for begin in range(0, H, HB):
        at = sample, row, row_out, begin + tl.arange(0, T * HB) % HB, is_row
        jvp_heads(
            q, q_shift, q_norm, tq, tq_shift, tq_norm, turn, tq_out_ptr, at,
            H, D, A, B, T, HB, ALIGN,
        )  # fmt: skip
        if k_ptr is not None:
            jvp_heads(
                k, k_shift, k_norm, tk, tk_shift, tk_norm, turn, tk_out_ptr, at,
                H, D, A, B, T, HB, ALIGN,
            )  # fmt: skip


def _tile(direction: str, x) -> dict[str, int]:
    """The constants of a kernel over tiles of tokens × heads."""
    elements, num_warps = tuned(f"qk_norm_rope.{direction}", x.device)
    H, D = x.shape[-2:]
    A, B = pieces(D)
    rows = 2 ** min(6, max(0, (elements // (A + B)).bit_length() - 1))
    HB = min(H & -H, 16, rows)  # the heads of a tile: a power of two that divides H
    return dict(H=H, D=D, A=A, B=B, T=rows // HB, HB=HB, num_warps=num_warps)


def _view_positions(positions, grid, sizes, order) -> list:
    """The kernels' arguments from position_ptr to freq_ptr."""
    position_b = 0 if positions is None or positions.ndim == 2 else 2 * positions.shape[1]
    period_s = 0 if sizes is None else sizes.stride(0)
    position_view = view_vector(positions)
    return [position_view, position_b, period_of(grid, order), POINTER, period_s, POINTER]


def _positions(q, positions, grid, sizes, order) -> tuple:
    """The tensors of those arguments."""
    if not is_rotated(positions, grid, sizes):
        return None, None, None
    return positions, periods_of(sizes, order), frequencies(q.shape[-1], q.device)


def _split(args):
    """The end of an operator's arguments: where tokens sit, and (eps, cu_seqlens, max_length)."""
    return args[:4], args[4:]


def forward(q, k, q_weight, q_bias, k_weight, k_bias, q_shift, k_shift, *tail):
    """(q', k'), an empty tensor for k' if there is no k."""
    where, (eps, cu, max_length) = _split(tail)
    tile = _tile("forward", q)
    programs, length, tiles = token_grid(q, cu, max_length, tile["T"])
    launch = Launch(
        _qk_norm_rope_forward_kernel, (programs,),
        (POINTER, length, tiles, *(view_heads(x, cu is not None) for x in (q, k)),
         *map(view_vector, (q_weight, q_bias, k_weight, k_bias)),
         *map(view_cond, (q_shift, k_shift)), *_view_positions(*where), POINTER, POINTER, eps),
        **tile,
    )  # fmt: skip

    def run(q, k, *rows_and_tail):
        rows, (where, (_, cu, _)) = rows_and_tail[:6], _split(rows_and_tail[6:])
        q_out = q.new_empty(q.shape)
        k_out = q.new_empty(0) if k is None else k.new_empty(k.shape)
        launch(cu, q, k, *rows, *_positions(q, *where), q_out, k_out)
        return q_out, k_out

    return run


def _backward(dq_out, dk_out, q, k, q_weight, k_weight, q_shift, k_shift, *tail_and_targets):
    """Fill dq and dk; (shifts, affine), float32: shifts (2, samples, heads·head_dim) for q and k,
    affine (4, head_dim) for q's weight and bias and k's. What nobody asked for is empty
    or unset."""
    *tail, dq, dk = tail_and_targets
    where, (eps, cu, max_length) = _split(tail)
    (H, D), tile, is_packed = q.shape[-2:], _tile("backward", q), cu is not None
    columns = H // tile["HB"]
    tokens = tokens_to_reduce(q, cu, max_length, tile["num_warps"], tile["T"], columns)
    programs, length, tiles = token_grid(q, cu, max_length, tokens)
    launch = Launch(
        _qk_norm_rope_backward_kernel, (programs, columns),
        (POINTER, length, tiles, tokens,
         *(view_heads(x, is_packed) for x in (dq_out, dk_out, q, k)),
         *map(view_vector, (q_weight, k_weight)), *map(view_cond, (q_shift, k_shift)),
         *_view_positions(*where), *(view_heads(x, is_packed) for x in (dq, dk)),
         *[POINTER] * 4, programs, eps),
        **tile,
    )  # fmt: skip
    samples, _ = samples_and_length(q, cu, max_length)
    is_shifted = q_shift is not None or k_shift is not None
    is_normed = q_weight is not None or k_weight is not None
    shift_shape = (2, samples, tiles, H * D) if is_shifted else (2, 0, 0, H * D)
    affine_shape = 4, programs * columns if is_normed else 0, D
    make = torch.zeros if launch.is_empty else torch.empty

    def run(dq_out, dk_out, q, k, q_weight, k_weight, q_shift, k_shift, *tail_and_targets):
        *tail, dq, dk = tail_and_targets
        where, (_, cu, _) = _split(tail)
        shifts = make(shift_shape, dtype=torch.float32, device=q.device)
        affine = make(affine_shape, dtype=torch.float32, device=q.device)
        launch(
            cu, dq_out, dk_out, q, k, q_weight, k_weight, q_shift, k_shift,
            *_positions(q, *where), dq, dk, shifts[0], shifts[1], affine[:2], affine[2:],
        )  # fmt: skip
        return shifts.sum(2), affine.sum(1)

    return run


backward, packed_backward = separate(_backward), packed(_backward)


def jvp(q, k, q_weight, k_weight, q_shift, k_shift, tq, tk, *tangents_and_tail):
    """Tangents of (q', k'); a tangent that is None is zero."""
    rows, tail = tangents_and_tail[:6], tangents_and_tail[6:]
    where, (eps, cu, max_length) = _split(tail)
    tile, is_packed = _tile("jvp", q), cu is not None
    programs, length, tiles = token_grid(q, cu, max_length, tile["T"])
    launch = Launch(
        _qk_norm_rope_jvp_kernel, (programs,),
        (POINTER, length, tiles, *(view_heads(x, is_packed) for x in (q, k)),
         *map(view_vector, (q_weight, k_weight)), *map(view_cond, (q_shift, k_shift)),
         *(view_heads(x, is_packed) for x in (tq, tk)), *map(view_vector, rows[:4]),
         *map(view_cond, rows[4:]), *_view_positions(*where), POINTER, POINTER, eps),
        **tile,
    )  # fmt: skip

    def run(q, k, *args):
        tensors, (where, (_, cu, _)) = args[:12], _split(args[12:])
        tq_out = q.new_empty(q.shape)
        tk_out = q.new_empty(0) if k is None else k.new_empty(k.shape)
        launch(cu, q, k, *tensors, *_positions(q, *where), tq_out, tk_out)
        return tq_out, tk_out

    return run
