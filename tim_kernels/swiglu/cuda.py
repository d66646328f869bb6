"""Launchers of csrc/swiglu.cu, as triton.py's; tangents are Triton's."""

from torch import Tensor

from ..dispatch import extension
from ..launch.calls import Made, Out
from ..launch.dense import call, made_as, one_dtype, read_as
from ..launch.views import view_matrix


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
    gate, value = args
    dtype, C = one_dtype(*args), gate.shape[-1] if value is not None else gate.shape[-1] // 2
    made = Made((*gate.shape[:-1], C), dtype, returned=gate.dtype)
    arguments = *_read(args, 0), Out(0, (), _matrix())
    is_empty = 0 in made.shape
    return call(extension.ops().swiglu_forward, arguments, (made,), args, is_empty=is_empty)


def backward(*args):
    """(dgate, dvalue), or of a packed gate its gradient and an empty tensor."""
    _, gate, value = args
    dtype = one_dtype(*args)
    outputs = Out(0, (), _matrix()), Out(1, (), _matrix())
    if value is None:
        outputs = Out(0, (), _matrix(half=0)), Out(0, (), _matrix(half=1))
    return call(
        extension.ops().swiglu_backward, (*_read(args, 1), *outputs),
        (made_as(dtype, gate), made_as(dtype, value)), args, is_empty=gate.numel() == 0,
    )  # fmt: skip
