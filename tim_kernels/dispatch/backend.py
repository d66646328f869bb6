"""Which implementation of an op runs, and why.

"reference" is plain PyTorch on any device; "triton" needs a CUDA device, or TRITON_INTERPRET=1
on a CPU; "cuda" is the compiled extension. "auto" takes for each op the first that can run, by
fastest.json: what was measured to be faster on that architecture, else "cuda" before "triton"; on
a CPU it takes "reference". Choose with `set_backend` for the process, `use_backend` for a
block of code in this thread, or the environment variable TIM_KERNELS_BACKEND.
"""

import contextlib
import functools
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from ..names import BACKENDS, Backend, checked
from . import extension
from .torch_private import constant_when_compiled


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


@dataclass(frozen=True)
class Op:
    """A folder of kernels: `triton()` imports the launchers that need Triton, `cuda` has those of
    csrc/, if there are any."""

    name: str
    triton: Callable[[], ModuleType]
    cuda: ModuleType | None = None

    def __post_init__(self):
        OPS[self.name] = self


OPS: dict[str, Op] = {}


_process = checked(os.environ.get("TIM_KERNELS_BACKEND", "auto"), BACKENDS, "TIM_KERNELS_BACKEND")
_thread = threading.local()


def set_backend(name: Backend) -> None:
    """Choose "auto", "reference", "triton" or "cuda" for the whole process."""
    global _process
    _process = checked(name, BACKENDS, "the backend")


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Choose a backend for the enclosed code, in this thread only."""
    before = getattr(_thread, "backend", None)
    _thread.backend = checked(name, BACKENDS, "the backend")
    try:
        yield
    finally:
        _thread.backend = before


def requested() -> Backend:
    """The backend in force in this thread, "auto" if nobody chose one."""
    return getattr(_thread, "backend", None) or _process


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, the one way to run them on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def obstacle(backend: str, op: str, device: str) -> str | None:
    """Why `backend` cannot run an op, by name, on real tensors of a device type; None if it can."""
    if backend == "reference":
        return None
    if backend == "cuda":
        return extension.why_not(device)  # what csrc/ does not have, Triton computes
    if not _has_triton():
        return "triton is not installed"
    if device != "cuda" and not interpreting():
        return f"it needs a CUDA device, not {device} (TRITON_INTERPRET=1 runs it on a CPU)"
    return None


FASTEST: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("fastest.json").read_text()
)  # by architecture, then op; made from results by `python -m benchmarks fastest --write`


def _first(op: str, device: str) -> str | None:
    """The fused backend that "auto" takes; None if none can run."""
    measured = None
    if device == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        measured = FASTEST.get(f"sm_{major}{minor}", {}).get(op)
    order = ("triton", "cuda") if measured == "triton" else ("cuda", "triton")
    return next((name for name in order if obstacle(name, op, device) is None), None)


@constant_when_compiled
def choose(op: str, device: str, is_real: bool = True) -> str:
    """The backend that runs an op, by name, on tensors of a device type; torch.compile fixes the
    answer when it traces. Meta and fake tensors get the chosen backend on any machine: nothing is
    computed.

    Raises:
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    name = requested()
    if name == "auto":
        return "reference" if device != "cuda" else _first(op, device) or "reference"
    if is_real and (reason := obstacle(name, op, device)):
        raise BackendUnavailable(f"backend {name!r} cannot run {op}: {reason}")
    return name


def fused(op: Op, args: tuple, device: str) -> str:
    """ "cuda" or "triton": whose kernels compute `op` of real arguments on a device type."""
    name = requested()
    if name in ("auto", "reference"):  # an operator called although the reference was chosen
        name = _first(op.name, device) or "triton"
        if name == "cuda" and not _is_fast(op, args) and not obstacle("triton", op.name, device):
            name = "triton"
    if reason := obstacle(name, op.name, device):
        raise BackendUnavailable(f"backend {name!r} cannot run {op.name}: {reason}")
    return name


def plan(op: Op, launcher: str, args: tuple, backend: str) -> Callable:
    """What computes a launcher of `op`, such as "forward", on tensors like these. Where csrc/ has
    no such launcher, or its launcher says None to these arguments, Triton's runs."""
    if backend == "cuda":
        make = getattr(op.cuda, launcher, None)
        if make is not None and (run := make(*args)) is not None:
            return run
    return getattr(op.triton(), launcher)(*args)


def _is_fast(op: Op, args: tuple) -> bool:
    """Whether csrc/ has its fast kernels for such arguments, and not only some that can do it."""
    is_fast = getattr(op.cuda, "is_fast", None)
    return is_fast is None or is_fast(*args)
