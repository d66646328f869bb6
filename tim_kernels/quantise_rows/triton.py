"""The Triton kernel that makes rows FP8."""

import torch
import triton
import triton.language as tl

from ..launch.calls import Made, Out
from ..launch.grid import kernel, launch
from ..launch.rows import load_rows, row_tile, store_rows_fp8
from ..launch.tuning import tuned
from ..launch.views import view_matrix


@kernel
def _quantise_rows_forward_kernel(
    rows, x_ptr, x_stride, out_ptr, scale_ptr,
    C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    a, b = load_rows(x_ptr, 0, 0, row, x_stride, is_row, ALIGN, C, A, B)
    store_rows_fp8(out_ptr, scale_ptr, row, is_row, a, b, C, A, B)


def forward(*args):
    """Values and scales."""
    (x,) = args
    rows = x.shape[:-1].numel()
    tile = row_tile(x.shape[-1], *tuned("quantise_rows", x.device), widest=1152)
    return launch(
        _quantise_rows_forward_kernel, (triton.cdiv(rows, tile["ROWS"]),),
        (rows, *view_matrix(args, 0), Out(0), Out(1)),
        (Made(x.shape, torch.float8_e4m3fn), Made((*x.shape[:-1], 1), torch.float32)), args, **tile,
    )  # fmt: skip
