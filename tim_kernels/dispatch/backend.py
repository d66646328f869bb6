"""Which implementation of an op runs, and why.

"reference" is plain PyTorch on any device; "triton" needs a CUDA device, or TRITON_INTERPRET=1
on a CPU; "cuda" is the compiled extension. "auto" takes for each op the first that can run, by
fastest.json: what was measured to be faster on that architecture, else "cuda" before "triton"; on
a CPU it takes "reference". Choose with `set_backend` for the process, `use_backend` for a
block of code in this thread, or the environment variable TIM_KERNELS_BACKEND.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import extension

BACKENDS = ("auto", "reference", "triton", "cuda")
OPS = (
    "ada_layer_norm",
    "attention",  # its tangent form; without tangents it is other people's kernels
    "qk_norm_rope",
    "swiglu",
    "time_pair_embedding",
    "transition_inputs",
    "transition_loss",
    "transition_step",
)


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


_process = _checked(os.environ.get("TIM_KERNELS_BACKEND", "auto"), "TIM_KERNELS_BACKEND")
_thread = threading.local()


def set_backend(name: str) -> None:
    """Choose "auto", "reference", "triton" or "cuda" for the whole process."""
    global _process
    _process = _checked(name, "the backend")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose a backend for the enclosed code, in this thread only."""
    before = getattr(_thread, "backend", None)
    _thread.backend = _checked(name, "the backend")
    try:
        yield
    finally:
        _thread.backend = before


def requested() -> str:
    """The backend in force in this thread, "auto" if nobody chose one."""
    return getattr(_thread, "backend", None) or _process


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, the one way to run them on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def obstacle(backend: str, op: str, device: str) -> str | None:
    """Why `backend` cannot run `op` on real tensors of a device type; None if it can."""
    if backend == "reference":
        return None
    if backend == "cuda":
        if not _is_there(f"tim_kernels.{op}.cuda"):
            return "the extension does not have it"
        return extension.obstacle(device)
    if not _is_there("triton"):
        return "triton is not installed"
    if device != "cuda" and not interpreting():
        return f"it needs a CUDA device, not {device} (TRITON_INTERPRET=1 runs it on a CPU)"
    return None


FASTEST: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("fastest.json").read_text()
)  # by architecture, then op; `python -m benchmarks.fastest --write` makes it from results


def _first(op: str, device: str) -> str | None:
    """The fused backend that "auto" takes; None if none can run."""
    measured = None
    if device == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        measured = FASTEST.get(f"sm_{major}{minor}", {}).get(op)
    order = ("triton", "cuda") if measured == "triton" else ("cuda", "triton")
    return next((name for name in order if obstacle(name, op, device) is None), None)


def _choose(op: str, device: str, is_real: bool) -> str:
    name = requested()
    if name == "auto":
        return "reference" if device != "cuda" else _first(op, device) or "reference"
    if is_real and (reason := obstacle(name, op, device)):
        raise BackendUnavailable(f"backend {name!r} cannot run {op}: {reason}")
    return name


# torch.compiler.assume_constant_result, without its import of the whole compiler
_choose._dynamo_marked_constant = True


def choose(op: str, tensor: Tensor) -> str:
    """The backend that runs `op` on `tensor`; torch.compile fixes the answer when it traces.

    Meta and fake tensors get the chosen backend on any machine: nothing is computed.

    Raises:
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    is_compiling = torch.compiler.is_compiling()
    is_real = not is_compiling and type(tensor) in (Tensor, torch.nn.Parameter)
    return _choose(op, tensor.device.type, is_real and tensor.device.type != "meta")


def is_reference(op: str, *tensors: Tensor | None) -> bool:
    """Whether the definition runs `op`: it was chosen, or a tensor is float64, for which no
    kernel is made."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return is_double or choose(op, tensors[0]) == "reference"


def _is_fast(op: str, tensor: Tensor) -> bool:
    """Whether csrc/ has its fast kernels for such a tensor, and not only some that can do it."""
    module = importlib.import_module(f"tim_kernels.{op}.cuda")
    return not hasattr(module, "is_fast") or module.is_fast(tensor)


def kernels(op: str, tensor: Tensor) -> ModuleType:
    """The module whose launchers compute `op` on a real tensor."""
    name = requested()
    device = tensor.device.type
    if name in ("auto", "reference"):  # an operator called although the reference was chosen
        name = _first(op, device) or "triton"
        if name == "cuda" and not _is_fast(op, tensor) and not obstacle("triton", op, device):
            name = "triton"
    if reason := obstacle(name, op, device):
        raise BackendUnavailable(f"backend {name!r} cannot run {op}: {reason}")
    return importlib.import_module(f"tim_kernels.{op}.{name}")


def explain() -> str:
    """Print, and return, what would run for each op on this machine, and why not the others."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [f"device {device}, backend {requested()!r}"]
    for op in OPS:
        try:
            chosen = _choose(op, device, True)
        except BackendUnavailable as error:
            chosen = f"none ({error})"
        others = "; ".join(
            f"not {backend}: {reason}"
            for backend in ("cuda", "triton")
            if (reason := obstacle(backend, op, device))
        )
        label = "attention, its tangent" if op == "attention" else op
        lines.append(f"{label:<32}{chosen:<12}{others}")
    lines.append(f"{'attention without tangents':<32}{_attention(device)}")
    text = "\n".join(lines)
    print(text)
    return text


def _attention(device: str) -> str:
    from ..attention.op import flash_attention

    if device != "cuda":
        return "PyTorch   not flash-attn: it needs a CUDA device"
    flash = flash_attention()
    if flash is None:
        return "PyTorch   not flash-attn: it is not installed"
    return f"{flash.__name__} for bfloat16 and float16, else PyTorch"
