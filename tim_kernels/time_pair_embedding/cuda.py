"""Launchers of csrc/time_pair_embedding.cu, as triton.py's; tangents are Triton's."""

from ..dispatch import extension
from ..launch.calls import Made, Out
from ..launch.dense import call, made_as, one_dtype, read_as
from ..launch.views import pointers, view_vectors
from .reference import DIM
from .slots import slot_codes


def forward(*args):
    """The sinusoids (slots, B, 256) of `times`, a list like "t,r,t-r"."""
    t, r, times, dtype = args
    slots, codes = slot_codes(times)
    return call(
        extension.ops().time_pair_embedding_forward,
        (*read_as(one_dtype(t, r), args, pointers(0, 1)), codes, Out(0)),
        (Made((slots, t.shape[0], DIM), dtype),), args, is_empty=t.numel() == 0,
    )  # fmt: skip


def backward(*args):
    """(dt, dr), in the times' dtypes."""
    _, t, r, times = args
    dtype, (_, codes) = one_dtype(t, r), slot_codes(times)
    return call(
        extension.ops().time_pair_embedding_backward,
        (*view_vectors(args, 0), *read_as(dtype, args, pointers(1, 2)), codes, Out(0), Out(1)),
        (made_as(dtype, t), made_as(dtype, r)), args, is_empty=t.numel() == 0,
    )  # fmt: skip
