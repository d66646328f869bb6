"""Triton kernels of out = silu(gate)·value, on two tensors or on the halves of one.

The op is elementwise, so the output is cut into runs of BLOCK elements, whatever its width: a run
starts anywhere in a row and may cross into the next ones, and no lane is idle but those past the
very end. The width is a constant, so finding row and column costs a multiplication, and the
compiler sees that 16 bytes never straddle a row whose width allows it. Inputs and gradients are
reached by a row stride, which is all that tells a packed half from a tensor of its own.

What sums gradients over tokens besides is a kernel of its own: a program has COLUMNS of some
tokens, ROWS at a time, and each thread keeps its sums in registers; sums over programs are
torch.sum's.

In the kernels g is gate, v value, d gradients, t tangents.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch.calls import Made, Out, like
from ..launch.grid import kernel, launch
from ..launch.rows import load_rows, row_tile, store_rows_fp8
from ..launch.shares import MOST, multiprocessors, share_of
from ..launch.tuning import tuned
from ..launch.views import In, view_matrix, view_vectors

UNITS = 16, 8, 4, 2, 1
COLUMNS = 512  # that a program sums


@triton.jit
def _locate(C: tl.constexpr, BLOCK: tl.constexpr):
    """Row and column of each element of this program's run.

    BLOCK is a power of two, so runs begin at multiples of UNIT = gcd(C, 16, BLOCK), as rows do:
    UNIT elements are side by side in one row, which compilers before Triton 3.9 have to be told.
    """
    UNIT: tl.constexpr = (C | 16 | BLOCK) & -(C | 16 | BLOCK)  # the lowest bit
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = (start % C).to(tl.int32) + tl.arange(0, BLOCK)
    row, column = start // C + i // C, i % C
    column = tl.max_contiguous(tl.multiple_of(column, UNIT), UNIT)
    return tl.max_constancy(row, UNIT), column


@triton.jit
def _load(ptr, stride, row, column, is_row, ALIGN: tl.constexpr):
    """Elements of a view as float32; zeros if ptr is None."""
    if ptr is None:
        return tl.zeros_like(column).to(tl.float32)
    else:
        return tl.load(ptr + row * stride * ALIGN + column, mask=is_row, other=0.0).to(tl.float32)


@triton.jit
def _silu(g):
    """silu(g) = g·σ(g) and its derivative σ(g)·(1 + g·(1 − σ(g)))."""
    s = tl.sigmoid(g)
    return g * s, s * (1 + g * (1 - s))


@kernel
def _swiglu_forward_kernel(
    rows, g_ptr, g_stride, v_ptr, v_stride, out_ptr, out_stride,
    C: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    row, column = _locate(C, BLOCK)
    is_row = row < rows
    g = _load(g_ptr, g_stride, row, column, is_row, ALIGN)
    v = _load(v_ptr, v_stride, row, column, is_row, ALIGN)
    y, _ = _silu(g)
    tl.store(out_ptr + row * out_stride * ALIGN + column, y * v, mask=is_row)


@kernel
def _swiglu_fp8_kernel(
    rows, g_ptr, g_stride, v_ptr, v_stride, out_ptr, scale_ptr,
    C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    ga, gb = load_rows(g_ptr, 0, 0, row, g_stride, is_row, ALIGN, C, A, B)
    va, vb = load_rows(v_ptr, 0, 0, row, v_stride, is_row, ALIGN, C, A, B)
    ya, _ = _silu(ga)
    yb, _ = _silu(gb)
    store_rows_fp8(out_ptr, scale_ptr, row, is_row, ya * va, yb * vb, C, A, B)


@kernel
def _swiglu_backward_kernel(
    rows, d_ptr, d_stride, g_ptr, g_stride, v_ptr, v_stride,
    dg_ptr, dg_stride, dv_ptr, dv_stride,
    C: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    row, column = _locate(C, BLOCK)
    is_row = row < rows
    d = _load(d_ptr, d_stride, row, column, is_row, ALIGN)
    g = _load(g_ptr, g_stride, row, column, is_row, ALIGN)
    v = _load(v_ptr, v_stride, row, column, is_row, ALIGN)
    y, slope = _silu(g)
    tl.store(dg_ptr + row * dg_stride * ALIGN + column, d * v * slope, mask=is_row)
    tl.store(dv_ptr + row * dv_stride * ALIGN + column, d * y, mask=is_row)


@kernel
def _swiglu_summed_backward_kernel(
    rows, rows_per_program, d_ptr, d_stride, g_ptr, g_stride, v_ptr, v_stride,
    dg_ptr, dg_stride, dv_ptr, dv_stride, partial_ptr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    start = tl.program_id(0).to(tl.int64) * rows_per_program
    stop = min(start + rows_per_program, rows)
    g_sum, v_sum = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(start, stop, ROWS):
        row = begin + tl.arange(0, ROWS)[:, None]
        is_there = (row < stop) & (column < C)
        d = _load(d_ptr, d_stride, row, column, is_there, ALIGN)
        g = _load(g_ptr, g_stride, row, column, is_there, ALIGN)
        v = _load(v_ptr, v_stride, row, column, is_there, ALIGN)
        y, slope = _silu(g)
        dg, dv = d * v * slope, d * y
        g_sum, v_sum = g_sum + dg, v_sum + dv
        tl.store(dg_ptr + row * dg_stride * ALIGN + column, dg, mask=is_there)
        tl.store(dv_ptr + row * dv_stride * ALIGN + column, dv, mask=is_there)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    partial_ptr += tl.program_id(0).to(tl.int64) * C + column  # (2, programs, C)
    tl.store(partial_ptr, tl.sum(g_sum, 0), mask=column < C)
    step = tl.num_programs(0).to(tl.int64) * C
    tl.store(partial_ptr + step, tl.sum(v_sum, 0), mask=column < C)


@kernel
def _swiglu_jvp_kernel(
    rows, g_ptr, g_stride, v_ptr, v_stride, tg_ptr, tg_stride, tv_ptr, tv_stride,
    tg_path_ptr, tv_path_ptr, out_ptr, out_stride,
    C: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    row, column = _locate(C, BLOCK)
    is_row = row < rows
    g = _load(g_ptr, g_stride, row, column, is_row, ALIGN)
    v = _load(v_ptr, v_stride, row, column, is_row, ALIGN)
    tg = _load(tg_ptr, tg_stride, row, column, is_row, ALIGN)
    tv = _load(tv_ptr, tv_stride, row, column, is_row, ALIGN)
    if tg_path_ptr is not None:
        tg += tl.load(tg_path_ptr + column, mask=is_row, other=0.0).to(tl.float32)
    if tv_path_ptr is not None:
        tv += tl.load(tv_path_ptr + column, mask=is_row, other=0.0).to(tl.float32)
    y, slope = _silu(g)
    tl.store(out_ptr + row * out_stride * ALIGN + column, tg * slope * v + y * tv, mask=is_row)


def _halves(args: tuple, gate: int, value: int, C: int, is_packed: bool) -> list[In]:
    """gate and value; those of a packed tensor are views of it."""
    if not is_packed or args[gate] is None:
        return view_matrix(args, gate, value)
    (whole,) = view_matrix(args, gate)
    return [whole, whole._replace(change=_second_half(C, whole.change))]


def _second_half(C: int, copy=None):
    return lambda x: (x if copy is None else copy(x)).narrow(-1, C, C)


def _grid(gate: Tensor, value: Tensor | None) -> tuple[int, int, int, dict[str, int]]:
    """The width C, the rows, the programs and the constants of a launch."""
    C = gate.shape[-1] if value is not None else gate.shape[-1] // 2
    rows = gate.shape[:-1].numel()
    block, num_warps = tuned("swiglu", gate.device)  # 8 a thread: 16 bytes of bfloat16
    return C, rows, triton.cdiv(rows * C, block), dict(C=C, BLOCK=block, num_warps=num_warps)


def forward(*args):
    """silu(gate)·value; value None says that gate is packed."""
    gate, value = args[:2]
    C, rows, programs, constants = _grid(gate, value)
    return launch(
        _swiglu_forward_kernel, (programs,),
        (rows, *_halves(args, 0, 1, C, value is None), Out(0, (C,))),
        (Made((*gate.shape[:-1], C), gate.dtype),), args, units=UNITS, **constants,
    )  # fmt: skip


def fp8(*args):
    """silu(gate)·value as FP8 values and scales: whole rows, since a row has one scale."""
    gate, value = args
    C, rows, _, _ = _grid(gate, value)
    tile = row_tile(C, *tuned("swiglu.fp8", gate.device), widest=4096)
    return launch(
        _swiglu_fp8_kernel, (triton.cdiv(rows, tile["ROWS"]),),
        (rows, *_halves(args, 0, 1, C, value is None), Out(0), Out(1)),
        (Made((*gate.shape[:-1], C), torch.float8_e4m3fn),
         Made((*gate.shape[:-1], 1), torch.float32)),
        args, **tile,
    )  # fmt: skip


summed = forward  # the paths are not read


def _outputs(gate: Tensor, value: Tensor | None, C: int) -> tuple[Out, Out]:
    """Where dgate and dvalue belong."""
    width = (gate.shape[-1],)
    return Out(0, width), Out(1, width) if value is not None else Out(0, width, _second_half(C))


def backward(*args):
    """(dgate, dvalue), or of a packed gate its gradient and an empty tensor."""
    _, gate, value = args
    C, rows, programs, constants = _grid(gate, value)
    return launch(
        _swiglu_backward_kernel, (programs,),
        (rows, *view_matrix(args, 0), *_halves(args, 1, 2, C, value is None),
         *_outputs(gate, value, C)),
        (like(gate), like(value)), args, units=UNITS, **constants,
    )  # fmt: skip


def summed_backward(*args):
    """As `backward`, and the sums of dgate and dvalue over tokens, float32 (2, C)."""
    _, gate, value = args
    C, rows, _, _ = _grid(gate, value)
    elements, num_warps = tuned("swiglu", gate.device)
    width = min(COLUMNS, triton.next_power_of_2(max(1, C)))
    step, columns = max(1, elements // width), triton.cdiv(C, width)
    resident = multiprocessors(gate.device) * max(1, 16 // num_warps) // max(1, columns)
    share = share_of(1, rows, max(1, resident), MOST, step)
    programs = triton.cdiv(rows, share)
    return launch(
        _swiglu_summed_backward_kernel, (programs, columns),
        (rows, share, *view_matrix(args, 0), *_halves(args, 1, 2, C, value is None),
         *_outputs(gate, value, C), Out(2)),
        (like(gate), like(value), Made((2, programs, C), torch.float32)), args,
        finish=lambda *made: (*made[:2], made[2].sum(1)), units=UNITS,
        C=C, ROWS=step, COLUMNS=width, num_warps=num_warps,
    )  # fmt: skip


def _jvp(args: tuple, tangent: int, of_paths):
    """Of gate's tangent, argument `tangent`, value's after it, and the paths'."""
    gate, value = args[:2]
    C, rows, programs, constants = _grid(gate, value)
    primal, tangents = (_halves(args, i, i + 1, C, value is None) for i in (0, tangent))
    return launch(
        _swiglu_jvp_kernel, (programs,), (rows, *primal, *tangents, *of_paths, Out(0, (C,))),
        (Made((*gate.shape[:-1], C), gate.dtype),), args, units=UNITS, **constants,
    )  # fmt: skip


def jvp(*args):
    """The tangent of silu(gate)·value; a tangent that is None is zero."""
    return _jvp(args, 2, (None, None))


def summed_jvp(*args):
    """The same with tangents of the paths."""
    return _jvp(args, 4, view_vectors(args, 6, 7))
