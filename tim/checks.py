"""Checks of tensor values that cost no device synchronisation."""

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import Tensor

from tim_kernels.dispatch.torch_private import is_mapped

_order_required = contextvars.ContextVar("order_required", default=True)


def readable(tensor: Tensor) -> bool:
    """Whether looking at values is free: a real CPU tensor, outside torch.compile and vmap."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not is_mapped((tensor,))
    )


def check_times(t: Tensor, r: Tensor, batch: int) -> None:
    """Refuse times that are not (batch,) or that run the wrong way (r > t)."""
    for name, time in (("t", t), ("r", r)):
        if time.shape != (batch,) or not time.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point tensor of shape ({batch},), one time a sample; "
                f"got {tuple(time.shape)} {time.dtype}"
            )
    if readable(t) and readable(r) and _order_required.get() and bool((r > t).any()):
        i = int((r > t).nonzero()[0])
        raise ValueError(
            f"r must not be later than t: sample {i} has r = {float(r[i]):g} > t = {float(t[i]):g}"
        )


@contextlib.contextmanager
def unordered_times() -> Iterator[None]:
    """Allow r > t for as long as it is open: a finite difference in t steps over t = r."""
    token = _order_required.set(False)
    try:
        yield
    finally:
        _order_required.reset(token)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity; reads the tensor, so call it once and not in a loop."""
    if not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name} must be finite, got {count} NaN or infinite values")
