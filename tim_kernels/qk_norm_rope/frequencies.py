"""RoPE's frequencies as the kernels take them."""

import threading

import torch
from torch import Tensor

from . import reference

_tables: dict[tuple[int, torch.device], Tensor] = {}


def _made_apart(head_dim: int, device: torch.device) -> Tensor:
    """In a thread of its own: what outlives a call must be no tensor of the functorch transform or
    inference mode that the caller is in, nor come from a memory pool of its CUDA graph."""
    made: list[Tensor] = []

    def make() -> None:
        made.append(reference.frequencies(head_dim, device))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams will read it

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def frequencies(head_dim: int, device: torch.device) -> Tensor:
    """The reference's own table, so that angles agree bit for bit; made once, or by a graph that
    is captured before anybody else needed it."""
    key = head_dim, device
    if key in _tables:
        return _tables[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return reference.frequencies(head_dim, device)
    return _tables.setdefault(key, _made_apart(head_dim, device))
