"""RoPE's frequencies as the kernels take them."""

import functools

import torch
from torch import Tensor

from . import reference


@functools.cache
def _cached(head_dim: int, device: torch.device) -> Tensor:
    freq = reference.frequencies(head_dim, device)
    if device.type == "cuda":  # other streams will read it
        torch.cuda.current_stream(device).synchronize()
    return freq


def frequencies(head_dim: int, device: torch.device) -> Tensor:
    """The reference's own table, so that angles agree bit for bit; made once."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return reference.frequencies(head_dim, device)
    return _cached(head_dim, device)
