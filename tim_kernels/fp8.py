"""FP8 E4M3 with one float32 scale a row (Micikevicius et al., arXiv 2209.05433)."""

import functools

import torch
from torch import Tensor

from .checks import accumulation_dtype
from .dispatch.torch_private import constant_when_compiled

LARGEST = 448.0  # that E4M3 has
SMALLEST = 2.0**-100  # largest value of a row that has a scale of its own; below it rows share one


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values float8_e4m3fn of x's shape (…, C), and scales float32 (…, 1), so that x ≈
    values·scales.

    A row's scale is its largest magnitude / 448; values are rounded to the nearest, ties to even,
    and saturate. A row of zeros, or of less than 2⁻¹⁰⁰, has the scale 2⁻¹⁰⁰ / 448. NaN and infinity
    in a row make its scale what they are, and everything of it NaN when it is multiplied out.
    """
    x = x.to(accumulation_dtype(x))
    scales = (x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / LARGEST).float()
    values = (x * (1 / scales.to(x.dtype))).clamp(-LARGEST, LARGEST)
    return values.to(torch.float8_e4m3fn), scales


@constant_when_compiled
def has_fp8(device: torch.device) -> bool:
    """Whether a device can be expected to convert to FP8: GPUs older than sm_89 do not."""
    return device.type != "cuda" or _capability(device) >= (8, 9)


@constant_when_compiled
def has_scaled_mm(device: torch.device) -> bool:
    """Whether torch._scaled_mm can be relied on there with a scale a row. The kernel of sm_89 does
    not keep to the current stream before torch 2.12 (pytorch/pytorch#177651)."""
    if device.type != "cuda":
        return device.type == "meta"
    capability = _capability(device)
    return capability > (8, 9) or (capability == (8, 9) and torch.__version__ >= (2, 12))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device; that of an H100 for a fake one where there is none."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)


def check_width(name: str, width: int) -> None:
    if width == 0:
        raise ValueError(f"{name} must have channels for a scale of theirs, got none")
