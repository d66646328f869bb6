"""RoPE's frequencies as the kernels take them."""

import torch
from torch import Tensor

from ..launch.plans import made_apart
from . import reference

_tables: dict[tuple[int, torch.device], Tensor] = {}


def frequencies(head_dim: int, device: torch.device) -> Tensor:
    """The reference's own table, so that angles agree bit for bit; made once, or by a graph that
    is captured before anybody else needed it."""
    key = head_dim, device
    if key in _tables:
        return _tables[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return reference.frequencies(head_dim, device)
    return _tables.setdefault(key, made_apart(lambda: reference.frequencies(head_dim, device)))
