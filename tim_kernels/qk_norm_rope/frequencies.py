"""RoPE's frequencies as the kernels take them."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from . import reference

_tables: dict[tuple[int, torch.device], Tensor] = {}


def made_apart(make: Callable[[], Tensor]) -> Tensor:
    """make(), in a thread of its own: what outlives a call must be no tensor of the functorch
    transform or inference mode that the caller is in, nor come from its CUDA graph's memory."""
    made: list[Tensor] = []

    def run() -> None:
        made.append(make())
        if made[0].is_cuda:
            torch.cuda.current_stream(made[0].device).synchronize()  # other streams will read it

    thread = threading.Thread(target=run)
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
    return _tables.setdefault(key, made_apart(lambda: reference.frequencies(head_dim, device)))
