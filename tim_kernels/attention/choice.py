"""Which kernel attention without tangents takes on a GPU for bfloat16 and float16, and why.

"flash_attn.cute", "flash_attn_interface" and "flash_attn" are flash-attn 4, 3 and 2; "cudnn" and
"flash" are PyTorch's cuDNN and flash attention, called by themselves; "native" is what PyTorch's
scaled_dot_product_attention takes. "auto" takes the first of `order` that can run. Choose with
`set_attention` for the process, or the environment variable TIM_KERNELS_ATTENTION.
"""

import functools
import importlib
import importlib.util
import os
import sys
from types import ModuleType

import torch
from torch import Tensor
from torch.backends import cuda, cudnn

from ..dispatch.backend import BackendUnavailable
from ..dispatch.torch_private import cached_constant
from ..launch.tuning import architecture
from ..names import ATTENTIONS, Attention, checked

NEWEST: tuple[Attention, ...] = "flash_attn.cute", "flash_attn_interface", "flash_attn"
ORDER: dict[int, tuple[Attention, ...]] = {}  # the fastest first, by architectures that were timed
CAN = {"cudnn": cuda.can_use_cudnn_attention, "flash": cuda.can_use_flash_attention}
WIDEST = {"cudnn": 128, "flash": 256}  # head_dim


_process = checked(
    os.environ.get("TIM_KERNELS_ATTENTION", "auto"), ATTENTIONS, "TIM_KERNELS_ATTENTION"
)


def set_attention(name: Attention) -> None:
    """Choose the kernel of attention without tangents, of bfloat16 and float16 on a GPU, for the
    whole process: "flash_attn.cute", "flash_attn_interface", "flash_attn", "cudnn", "flash",
    "native" or "auto". What a kernel does not take, PyTorch's own choice computes; what
    torch.compile has traced stays as it is.

    Raises:
        ValueError: another name.
        BackendUnavailable: it cannot run here; the message says why.
    """
    global _process
    name = checked(name, ATTENTIONS, "the attention")
    if reason := obstacle(name):
        raise BackendUnavailable(f"attention by {name!r} cannot run: {reason}")
    _process = name
    chosen.cache_clear()


def requested() -> Attention:
    """What was asked for, whether it can run here or not."""
    return _process


def order() -> tuple[tuple[Attention, ...], str]:
    """The one to take first, and why in that order."""
    if _process != "auto":
        return (_process,), "as asked for"
    own = architecture(torch.device("cuda")) if torch.cuda.is_available() else None
    if own in ORDER:
        return ORDER[own], f"the fastest, as timed on sm_{own}"
    return NEWEST, "the newest, as nobody has timed them on this GPU"


def obstacle(name: str) -> str | None:
    """Why it cannot run on this machine; None if it can."""
    if name in ("auto", "native"):
        return None
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    if name in NEWEST:
        return None if _module(name) else "it is not installed"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    if name == "cudnn":
        is_there, is_on = cudnn.is_available(), cuda.cudnn_sdp_enabled()
    else:
        is_there, is_on = cuda.is_flash_attention_available(), cuda.flash_sdp_enabled()
    if not is_there:
        return "this PyTorch was built without it"
    return None if is_on else "it is switched off in torch.backends.cuda"


@cached_constant
def chosen() -> Attention:
    """The first of `order` that can run; "native" without one.

    Raises:
        BackendUnavailable: the one that was asked for cannot.
    """
    names, _ = order()
    for name in names:
        reason = obstacle(name)
        if reason is None:
            return name
        if _process != "auto":
            raise BackendUnavailable(f"attention by {name!r} cannot run: {reason}")
    return "native"


def package(name: str) -> ModuleType | None:
    """The module of flash-attn by this name; None if it is no such name."""
    return sys.modules[name] if name in NEWEST else None


@functools.cache
def _module(name: str) -> ModuleType | None:
    try:
        if importlib.util.find_spec(name) is None:
            return None
        module = importlib.import_module(name)
    except ImportError:
        return None
    needed = "flash_attn_func", "flash_attn_varlen_func"
    return module if all(hasattr(module, function) for function in needed) else None


def by_itself(
    name: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, is_causal: bool
) -> Tensor | None:
    """PyTorch's kernel of this name, of (B, N, heads, head_dim); None if it does not take them.

    Its operator, not the settings of sdpa_kernel, which are of all threads.
    """
    is_grouped = q.shape[-2] != k.shape[-2]
    if name not in CAN or q.shape[-1] > WIDEST[name] or (is_grouped and name == "cudnn"):
        return None
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if not torch.compiler.is_compiling():  # which cannot ask
        params = cuda.SDPAParams(*heads_first, None, 0.0, is_causal, is_grouped)
        if not CAN[name](params):
            return None
    if name == "cudnn":
        needs_lse = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads_first, None, needs_lse, 0.0, is_causal, scale=scale
        )
    else:
        out = torch.ops.aten._scaled_dot_product_flash_attention(
            *heads_first, 0.0, is_causal, scale=scale
        )
    return out[0].transpose(1, 2)
