"""Attention: a choice among the kernels others keep well, never a home-made forward."""

import functools
import importlib
import importlib.util

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..segments import Segments
from . import reference


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments | None = None,
    k_segments: Segments | None = None,
) -> Tensor:
    """softmax(q·kᵀ/√head_dim)·v, without mask or dropout (arXiv 1706.03762, equation 1).

    Args:
        q: (B, N, heads, head_dim), or (T, heads, head_dim) packed with `segments`.
        k, v: (B, M, heads, head_dim), or (S, heads, head_dim) packed with `k_segments`, which
            are `segments` unless given.

    Runs flash-attn where it is installed and can (CUDA, bfloat16 or float16), else PyTorch's
    scaled_dot_product_attention. Returns q's shape and dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check(q, k, v, segments, k_segments)
    flash = flash_attention() if _is_flash_ready(q, k, v) else None
    if flash is None:
        return reference.attention(q, k, v, segments, k_segments)
    if segments is None:
        return flash.flash_attn_func(q, k, v)
    keys = k_segments or segments
    return flash.flash_attn_varlen_func(
        q, k, v, segments.cu_seqlens, keys.cu_seqlens, segments.max_length, keys.max_length
    )


@functools.cache
def flash_attention():
    """The newest flash-attn that is importable: 4, 3 or 2; None without one."""
    for name in ("flash_attn.cute", "flash_attn_interface", "flash_attn"):
        try:
            if importlib.util.find_spec(name) is None:
                continue
            module = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(module, "flash_attn_func") and hasattr(module, "flash_attn_varlen_func"):
            return module
    return None


def _is_flash_ready(*tensors: Tensor) -> bool:
    q = tensors[0]
    has_tangent = forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and not has_tangent
    )


def _check(q, k, v, segments, k_segments) -> None:
    ndim, layout = (
        (4, "(B, N, heads, head_dim)") if segments is None else (3, "(T, heads, head_dim)")
    )
    if segments is None and k_segments is not None:
        raise ValueError("k_segments need segments: queries and keys are packed together")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != ndim or x.shape[-2:] != q.shape[-2:]:
            raise ValueError(
                f"{name} must be {layout} with q's heads and head_dim {tuple(q.shape[-2:])}; "
                f"got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}"
            )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)}, {tuple(v.shape)}")
    if segments is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have q's batch {q.shape[0]}, got {k.shape[0]}")
