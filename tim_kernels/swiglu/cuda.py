"""Launchers of csrc/swiglu.cu, as triton.py's; tangents are Triton's."""

import math

import torch
from torch import Tensor

from ..dispatch import extension
from ..launch.calls import Made, Out
from ..launch.dense import call, made_as, one_dtype, read_as
from ..launch.shares import MOST, multiprocessors, share_of
from ..launch.views import view_matrix

THREADS, TOKENS, CHUNK = 128, 2, 8  # as in csrc/swiglu.cu and common.cuh
SUMMED_BLOCKS = 7  # that a multiprocessor holds


def _matrix(copy=None, half: int | None = None):
    """(rows, C) of a tensor, or of its first or second half."""

    def change(x: Tensor) -> Tensor:
        x = x if copy is None else copy(x)
        x = x.reshape(-1, x.shape[-1])
        return x if half is None else x.chunk(2, dim=1)[half]

    return change


def _read(args: tuple, gate: int) -> list:
    """gate, argument `gate`, and value as (rows, C), after whatever comes before them."""
    dtype, is_packed = one_dtype(*args), args[gate + 1] is None
    *before, gate, value = read_as(dtype, args, view_matrix(args, *range(len(args))))
    if is_packed:
        halves = [gate._replace(change=_matrix(gate.change, half)) for half in (0, 1)]
    else:
        halves = [view._replace(change=_matrix(view.change)) for view in (gate, value)]
    return [*(view._replace(change=_matrix(view.change)) for view in before), *halves]


def forward(*args):
    """silu(gate)·value; value None says that gate is packed."""
    gate, value = args[:2]
    made = Made(_shape(gate, value), one_dtype(gate, value), returned=gate.dtype)
    arguments = *_read(args[:2], 0), Out(0, (), _matrix())
    is_empty = 0 in made.shape
    return call(extension.ops().swiglu_forward, arguments, (made,), args, is_empty=is_empty)


summed = forward  # the paths are not read


def _shape(gate: Tensor, value: Tensor | None) -> tuple[int, ...]:
    """The output's."""
    return *gate.shape[:-1], gate.shape[-1] if value is not None else gate.shape[-1] // 2


def _outputs(value: Tensor | None) -> tuple[Out, Out]:
    """Where dgate and dvalue belong."""
    if value is None:
        return Out(0, (), _matrix(half=0)), Out(0, (), _matrix(half=1))
    return Out(0, (), _matrix()), Out(1, (), _matrix())


def backward(*args):
    """(dgate, dvalue), or of a packed gate its gradient and an empty tensor."""
    _, gate, value = args
    dtype = one_dtype(*args)
    return call(
        extension.ops().swiglu_backward, (*_read(args, 1), *_outputs(value)),
        (made_as(dtype, gate), made_as(dtype, value)), args, is_empty=gate.numel() == 0,
    )  # fmt: skip


def summed_backward(*args):
    """As `backward`, and the sums of dgate and dvalue over tokens, float32 (2, C)."""
    _, gate, value = args
    dtype = one_dtype(*args)
    *_, C = shape = _shape(gate, value)
    rows, columns = math.prod(shape[:-1]), max(1, -(-C // (THREADS * CHUNK)))
    resident = max(1, SUMMED_BLOCKS * multiprocessors(gate.device) // columns)
    share = share_of(1, rows, resident, MOST, TOKENS)
    sums = Made((2, -(-rows // share), C), torch.float32)
    return call(
        extension.ops().swiglu_summed_backward,
        (*_read(args, 1), *_outputs(value), Out(2), share),
        (made_as(dtype, gate), made_as(dtype, value), sums), args,
        finish=lambda *made: (*made[:2], made[2].sum(1)), is_empty=gate.numel() == 0,
    )  # fmt: skip
