"""Whose products linear layers are, and whether those take up what follows them.

"torch" multiplies alone. "quack" is the library quack-kernels, whose products on Hopper GPUs end in
SwiGLU, its derivative, or the gated residual, so that what they feed is never written. Choose with
`set_linear` for the process, or the environment variable TIM_KERNELS_LINEAR.
"""

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from ..dispatch.backend import BackendUnavailable
from ..dispatch.torch_private import is_forward_mode, is_functorch_active
from ..names import LINEARS, Linear, checked

HALVES = torch.bfloat16, torch.float16
AUTOCAST = "cpu", "cuda"
UNIT = 8  # channels: rows begin at multiples of 16 bytes


_process = checked(os.environ.get("TIM_KERNELS_LINEAR", "torch"), LINEARS, "TIM_KERNELS_LINEAR")


def set_linear(name: Linear) -> None:
    """Choose whose products the linear layers of a network are, for the whole process: "torch", or
    "quack" (`pip install "tim-kernels[hopper]"`), which on a Hopper GPU ends fc1 in SwiGLU, the
    gradient of fc2's input in SwiGLU's, and in inference the projections in the gated residual.

    It acts on bfloat16 and float16, autocast included, on plain layers of many tokens; forward
    mode, torch.func and torch.compile go by "torch". No GPU has run it yet: it is off until the
    gate's stage `products` has passed on yours (docs/hopper.md).

    Raises:
        ValueError: another name.
        BackendUnavailable: it cannot run here; the message says why.
    """
    global _process
    _process = _able(checked(name, LINEARS, "the library of linear layers"))


def requested() -> Linear:
    """What was asked for, whether it can run here or not."""
    return _process


def chosen() -> Linear:
    """
    Raises:
        BackendUnavailable: what was asked for cannot run.
    """
    return _able(_process)


def _able(name: Linear) -> Linear:
    if reason := obstacle(name):
        raise BackendUnavailable(f"linear layers by {name!r} cannot run: {reason}")
    return name


@functools.cache
def obstacle(name: str) -> str | None:
    """Why it cannot run on this machine; None if it can."""
    if name == "torch":
        return None
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    if not _is_hopper(None):
        return "it needs a Hopper GPU, of compute capability 9.0"
    try:
        launchers()
    except ImportError as error:
        return f'pip install "tim-kernels[hopper]" ({error})'
    return None


def _is_hopper(device: torch.device | None) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def launchers() -> ModuleType:
    """
    Raises:
        ImportError: quack-kernels, or what it needs, is not installed.
    """
    from . import quack

    return quack


def product_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer multiplies tokens x in."""
    return torch.get_autocast_dtype(x.device.type) if is_cast(x) else x.dtype


def is_cast(x: Tensor) -> bool:
    """Whether autocast casts what is multiplied with x."""
    device = x.device.type
    casts = device in AUTOCAST and torch.is_autocast_enabled(device)
    return casts and x.dtype != torch.float64  # which autocast leaves as it is


def takes(x: Tensor, *weights: Tensor) -> bool:
    """Whether linear layers of tokens x (…, K) may take up what follows them: it was chosen, and
    dtypes, widths and devices fit.

    Raises:
        BackendUnavailable: what was asked for cannot run.
    """
    if _process == "torch" or torch.compiler.is_compiling():
        return False
    if is_forward_mode() or is_functorch_active() or x.device.type not in ("cuda", "meta"):
        return False
    dtype = product_dtype(x)
    fits = all(width % UNIT == 0 for weight in weights for width in weight.shape)
    same = is_cast(x) or all(weight.dtype == dtype for weight in weights)
    here = all(weight.device == x.device for weight in weights)
    may = dtype in HALVES and fits and same and here and x.numel() > 0
    return may and (x.is_meta or (chosen() == "quack" and _is_hopper(x.device)))
