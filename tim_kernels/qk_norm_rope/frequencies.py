"""RoPE's frequencies as the kernels take them."""

import functools
import threading

import torch
from torch import Tensor

from . import reference


@functools.cache
def _cached(head_dim: int, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return reference.frequencies(head_dim, device)
    made: list[Tensor] = []

    def make() -> None:
        with torch.cuda.device(device):
            made.append(reference.frequencies(head_dim, device))
            torch.cuda.current_stream(device).synchronize()  # other streams will read it

    # In a thread of its own: what outlives a call must not come from the memory pool that a
    # torch.compile with CUDA graphs may have given the calling thread.
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def frequencies(head_dim: int, device: torch.device) -> Tensor:
    """The reference's own table, so that angles agree bit for bit; made once."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return reference.frequencies(head_dim, device)
    return _cached(head_dim, device)
