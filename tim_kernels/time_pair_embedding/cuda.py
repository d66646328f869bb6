"""Launchers of csrc/time_pair_embedding.cu, as triton.py's; tangents are Triton's."""

from ..dispatch import extension
from ..launch.dense import Reader, one_dtype
from ..launch.views import POINTER, view_vector
from .reference import DIM
from .slots import slot_codes


def _reader(t, r) -> Reader:
    dtype = one_dtype(t, r)
    return Reader((t, dtype, POINTER), (r, dtype, POINTER))


def forward(t, r, times, dtype):
    """The sinusoids (slots, B, 256) of `times`, a list like "t,r,t-r"."""
    read, (slots, codes) = _reader(t, r), slot_codes(times)
    launch = extension.ops().time_pair_embedding_forward.default

    def run(t, r, times, dtype):
        t, r = read(t, r)
        out = t.new_empty((slots, t.shape[0], DIM), dtype=dtype)
        if out.numel():
            launch(t, r, codes, out)
        return out

    return run


def backward(dout, t, r, times):
    """(dt, dr), in the times' dtypes."""
    read, (_, codes) = _reader(t, r), slot_codes(times)
    read_gradient = Reader((dout, dout.dtype, view_vector(dout)))
    launch = extension.ops().time_pair_embedding_backward.default

    def run(dout, t, r, times):
        dtypes = t.dtype, r.dtype
        (dout,), (t, r) = read_gradient(dout), read(t, r)
        dt, dr = t.new_empty(t.shape), r.new_empty(r.shape)
        if t.numel():
            launch(dout, t, r, codes, dt, dr)
        return dt.to(dtypes[0]), dr.to(dtypes[1])

    return run
