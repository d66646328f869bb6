"""Launchers of csrc/time_pair_embedding.cu, with the arguments of triton.py's; tangents are
Triton's."""

import torch

from ..dispatch.extension import one_dtype, tangents_in_triton
from .slots import slot_codes

DIM = 256  # of a sinusoid


def forward(t, r, times, dtype):
    """The sinusoids (slots, B, 256) of `times`, a list like "t,r,t-r"."""
    slots, codes = slot_codes(times)
    t, r = one_dtype(t, r)
    out = torch.empty((slots, t.shape[0], DIM), dtype=dtype, device=t.device)
    if out.numel():
        torch.ops.tim_kernels_cuda.time_pair_embedding_forward(t, r, codes, out)
    return out


def backward(dout, t, r, times):
    """(dt, dr), in the times' dtypes."""
    _, codes = slot_codes(times)
    dtypes = t.dtype, r.dtype
    t, r = one_dtype(t, r)
    dt, dr = t.new_empty(t.shape), r.new_empty(r.shape)
    if t.numel():
        dout = dout.contiguous()
        torch.ops.tim_kernels_cuda.time_pair_embedding_backward(dout, t, r, codes, dt, dr)
    return dt.to(dtypes[0]), dr.to(dtypes[1])


jvp = tangents_in_triton("time_pair_embedding")
