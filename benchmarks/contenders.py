"""Who runs in a comparison, and who is left out and why."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from tim_kernels.dispatch import backend

from . import peers
from .calls import Call
from .results import COMPILE, EAGER, FUSED
from .timing import is_cuda

OWN = ("reference", *FUSED)
COMPILED_ON_CPU = "forward + backward"


class Contender(NamedTuple):
    """`function(*tensors, *constants)` is the call; `wrap` is put around what is run."""

    name: str
    function: Callable
    wrap: Callable[[Callable], Callable] = lambda function: function
    backend: str | None = None

    @property
    def is_own(self) -> bool:
        """Ours, or eager PyTorch, on which everything is measured."""
        return self.name in (EAGER, *OWN)

    def active(self) -> contextlib.AbstractContextManager:
        return running_on(self.backend, is_compiled=self.name == COMPILE)


@contextlib.contextmanager
def running_on(name: str | None, is_compiled: bool) -> Iterator[None]:
    """A backend, for the whole process: on a GPU backward runs in another thread. What
    torch.compile made is forgotten afterwards."""
    before = backend._process
    backend.set_backend(name or before)
    try:
        yield
    finally:
        backend.set_backend(before)
        if is_compiled:
            torch._dynamo.reset()


def compiled(function: Callable) -> Callable:
    """For the very shapes it will see: no general kernel is measured."""
    return torch.compile(function, dynamic=False)


def contenders(
    call: Call, device: str, direction: str, interpret: bool = False
) -> tuple[list[Contender], dict[str, str]]:
    """Those that can run this call here, eager first, and why the others can not.

    Triton's interpreter is no contender unless `interpret`: its time says nothing.
    """
    here, left_out = [Contender(EAGER, call.eager)], {}
    if is_cuda(device) or direction == COMPILED_ON_CPU:
        here.append(Contender(COMPILE, call.eager, compiled))
    else:
        left_out[COMPILE] = f"on a CPU only {COMPILED_ON_CPU} is compiled: it takes seconds each"
    if not is_cuda(device):
        here.append(Contender("reference", call.function, backend="reference"))
    for name in FUSED:
        reason = backend.obstacle(name, call.op, device)
        if name == "triton" and reason is None and not is_cuda(device) and not interpret:
            reason = "its interpreter's time says nothing about the kernel"
        if name == "cuda" and direction == "tangent":
            reason = "its tangents are Triton's"
        if reason:
            left_out[name] = reason
        else:
            here.append(Contender(name, call.function, backend=name))
    for peer in peers.PEERS:
        if peer.call != call.name:
            continue
        if not is_cuda(device):
            left_out[peer.name] = f"it needs a CUDA device, not {device}"
        elif importlib.util.find_spec(peer.package) is None:
            left_out[peer.name] = f"{peer.package} is not installed"
        else:
            try:
                here.append(Contender(peer.name, peer.load()))
            except Exception as error:  # another version than the one this was written for
                left_out[peer.name] = f"{peer.package} is there but does not fit: {error!r}"
    return here, left_out
