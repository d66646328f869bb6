"""Triton kernels of out = silu(gate)·value, on two tensors or on the halves of one.

The op is elementwise, so the output is cut into runs of BLOCK elements, whatever its width: a run
starts anywhere in a row and may cross into the next ones, and no lane is idle but those past the
very end. The width is a constant, so finding row and column costs a multiplication, and the
compiler sees that 16 bytes never straddle a row whose width allows it. Inputs and gradients are
reached by a row stride, which is all that tells a packed half from a tensor of its own.

In the kernels g is gate, v value, d gradients, t tangents.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch.grid import Launch, kernel
from ..launch.tuning import tuned
from ..launch.views import View, view_matrix


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
def _swiglu_jvp_kernel(
    rows, g_ptr, g_stride, v_ptr, v_stride, tg_ptr, tg_stride, tv_ptr, tv_stride,
    out_ptr, out_stride,
    C: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    row, column = _locate(C, BLOCK)
    is_row = row < rows
    g = _load(g_ptr, g_stride, row, column, is_row, ALIGN)
    v = _load(v_ptr, v_stride, row, column, is_row, ALIGN)
    tg = _load(tg_ptr, tg_stride, row, column, is_row, ALIGN)
    tv = _load(tv_ptr, tv_stride, row, column, is_row, ALIGN)
    y, slope = _silu(g)
    tl.store(out_ptr + row * out_stride * ALIGN + column, tg * slope * v + y * tv, mask=is_row)


def _width(gate: Tensor, value: Tensor | None) -> int:
    return gate.shape[-1] if value is not None else gate.shape[-1] // 2


def _views(gate: Tensor | None, value: Tensor | None, is_packed: bool) -> list[View]:
    """Of gate and value; the halves of a packed tensor have its stride."""
    return [view_matrix(gate), view_matrix(gate if is_packed else value)]


def _halves(gate, value, C: int, is_packed: bool):
    """What the two views are views of."""
    if not is_packed:
        return gate, value
    return (None, None) if gate is None else (gate, gate.narrow(-1, C, C))


def _launch(function, like: Tensor, C: int, *views: View) -> Launch:
    """`function` over the (…, C) that `like`, of any width, has rows for."""
    rows = like.shape[:-1].numel()
    block, num_warps = tuned("swiglu", like.device)  # 8 a thread: 16 bytes of bfloat16
    programs = triton.cdiv(rows * C, block)
    units = 16, 8, 4, 2, 1
    constants = dict(C=C, BLOCK=block, num_warps=num_warps)
    return Launch(function, (programs,), (rows, *views), units, **constants)


def forward(gate, value):
    """silu(gate)·value; value None says that gate is packed."""
    C, is_packed = _width(gate, value), value is None
    views = *_views(gate, value, is_packed), View((C,))
    launch = _launch(_swiglu_forward_kernel, gate, C, *views)
    shape = *gate.shape[:-1], C

    def run(gate, value):
        out = gate.new_empty(shape)
        launch(*_halves(gate, value, C, is_packed), out)
        return out

    return run


def backward(dout, gate, value):
    """(dgate, dvalue), or of a packed gate its gradient and an empty tensor."""
    C, is_packed = _width(gate, value), value is None
    width = View((gate.shape[-1],))
    views = view_matrix(dout), *_views(gate, value, is_packed), width, width
    launch = _launch(_swiglu_backward_kernel, gate, C, *views)

    def run(dout, gate, value):
        dgate = gate.new_empty(gate.shape)
        dvalue = gate.new_empty(0) if is_packed else value.new_empty(value.shape)
        inputs = _halves(gate, value, C, is_packed)
        launch(dout, *inputs, *_halves(dgate, dvalue, C, is_packed))
        return dgate, dvalue

    return run


def jvp(gate, value, tgate, tvalue):
    """The tangent of silu(gate)·value; a tangent that is None is zero."""
    C, is_packed = _width(gate, value), value is None
    views = *_views(gate, value, is_packed), *_views(tgate, tvalue, is_packed), View((C,))
    launch = _launch(_swiglu_jvp_kernel, gate, C, *views)
    shape = *gate.shape[:-1], C

    def run(gate, value, tgate, tvalue):
        tout = gate.new_empty(shape)
        inputs = _halves(gate, value, C, is_packed)
        launch(*inputs, *_halves(tgate, tvalue, C, is_packed), tout)
        return tout

    return run
