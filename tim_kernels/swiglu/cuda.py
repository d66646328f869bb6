"""Launchers of csrc/swiglu.cu, as triton.py's; tangents are Triton's."""

import math

import torch
from torch import Tensor

from ..dispatch import extension
from ..launch.calls import Made, Out
from ..launch.dense import call, made_as, one_dtype, read_as
from ..launch.shares import MOST, multiprocessors, share_of
from ..launch.views import view_matrix, view_vectors

THREADS, TOKENS, CHUNK = 128, 2, 8  # as in csrc/swiglu.cu and common.cuh
BACKWARD_BLOCKS = 5  # that a multiprocessor holds, with biases


def _matrix(copy=None, half: int | None = None):
    """(rows, C) of a tensor, or of its first or second half."""

    def change(x: Tensor) -> Tensor:
        x = x if copy is None else copy(x)
        x = x.reshape(-1, x.shape[-1])
        return x if half is None else x.chunk(2, dim=1)[half]

    return change


def _read(args: tuple, gate: int, dtype: torch.dtype) -> list:
    """gate, argument `gate`, and value as (rows, C), after whatever comes before them."""
    *before, gate_, value = read_as(dtype, args, view_matrix(args, *range(gate + 2)))
    if args[gate + 1] is None:
        halves = [gate_._replace(change=_matrix(gate_.change, half)) for half in (0, 1)]
    else:
        halves = [view._replace(change=_matrix(view.change)) for view in (gate_, value)]
    return [*(view._replace(change=_matrix(view.change)) for view in before), *halves]


def _read_biases(args: tuple, dtype: torch.dtype) -> list:
    """The last two arguments, in that dtype if both are, else in float32."""
    biases = len(args) - 2, len(args) - 1
    is_same = one_dtype(*(args[i] for i in biases)) == dtype
    return read_as(dtype if is_same else torch.float32, args, view_vectors(args, *biases))


def _shape(gate: Tensor, value: Tensor | None) -> tuple[int, ...]:
    C = gate.shape[-1] if value is not None else gate.shape[-1] // 2
    return *gate.shape[:-1], C


def forward(*args):
    """silu(gate)·value; value None says that gate is packed."""
    dtype = one_dtype(*args)
    made = Made(_shape(*args), dtype, returned=args[0].dtype)
    return call(
        extension.ops().swiglu_forward, (*_read(args, 0, dtype), Out(0, (), _matrix())), (made,),
        args, is_empty=0 in made.shape,
    )  # fmt: skip


def biased(*args):
    """silu(gate + gate_bias)·(value + value_bias)."""
    dtype = one_dtype(*args[:2])
    made = Made(_shape(*args[:2]), dtype, returned=args[0].dtype)
    return call(
        extension.ops().swiglu_biased_forward,
        (*_read(args, 0, dtype), *_read_biases(args, dtype), Out(0, (), _matrix())), (made,), args,
        is_empty=0 in made.shape,
    )  # fmt: skip


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
        extension.ops().swiglu_backward, (*_read(args, 1, dtype), *_outputs(value)),
        (made_as(dtype, gate), made_as(dtype, value)), args, is_empty=gate.numel() == 0,
    )  # fmt: skip


def biased_backward(*args):
    """As `backward`, and the sums of dgate and dvalue over tokens, float32 (2, C)."""
    _, gate, value, *_ = args
    dtype = one_dtype(*args[:3])
    *_, C = shape = _shape(gate, value)
    rows, columns = math.prod(shape[:-1]), max(1, -(-C // (THREADS * CHUNK)))
    resident = max(1, BACKWARD_BLOCKS * multiprocessors(gate.device) // columns)
    share = share_of(1, rows, resident, MOST, TOKENS)
    return call(
        extension.ops().swiglu_biased_backward,
        (*_read(args, 1, dtype), *_read_biases(args, dtype), *_outputs(value), Out(2), share),
        (made_as(dtype, gate), made_as(dtype, value),
         Made((2, -(-rows // share), C), torch.float32)), args,
        finish=lambda *made: (*made[:2], made[2].sum(1)), is_empty=gate.numel() == 0,
    )  # fmt: skip
