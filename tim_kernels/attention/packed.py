"""Attention of packed sequences by PyTorch's kernels, without a mask of all pairs of tokens."""

import importlib
import importlib.util
import inspect
import sys
from typing import Literal

import torch
from torch import Tensor

from ..dispatch.torch_private import cached_constant
from ..segments import Segments
from . import reference

VARLEN = "torch.nn.attention.varlen"
Way = Literal["varlen", "segments", "padded"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    k_segments: Segments | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    has_flash: bool = False,
) -> Tensor:
    """Of q (T, heads, head_dim) and k, v (S, heads, head_dim), see `way`.

    `has_flash` says that PyTorch's flash attention can compute these tensors.
    """
    keys, options = k_segments or segments, dict(scale=scale, is_causal=is_causal)
    grouped = {} if q.shape[-2] == k.shape[-2] else dict(enable_gqa=True)
    chosen = way(segments, keys, has_flash, *grouped)
    if chosen == "varlen":
        return sys.modules[VARLEN].varlen_attn(
            q, k, v, segments.cu_seqlens, keys.cu_seqlens, segments.max_length, keys.max_length,
            scale=scale, window_size=(-1, 0 if is_causal else -1), **grouped,
        )  # fmt: skip
    if chosen == "padded":
        return _padded(q, k, v, segments, keys, options)
    return _by_segment(q, k, v, segments.lengths, keys.lengths, options)


def way(segments: Segments, keys: Segments, has_flash: bool, *options: str) -> Way:
    """How packed sequences attend: "varlen", PyTorch's flash attention of packed sequences, in one
    launch, where it exists with these `options` and can; "segments", one after the other, where
    their lengths are known on the host; else "padded" to the longest."""
    if has_flash and has_varlen(*options):
        return "varlen"
    if torch.compiler.is_compiling() or None in (segments.lengths, keys.lengths):
        return "padded"
    return "segments"


@cached_constant
def has_varlen(*options: str) -> bool:
    """Whether this PyTorch has such an attention, with a scale, a window and further `options`
    (PyTorch 2.11 has no enable_gqa), and the GPU runs it."""
    if importlib.util.find_spec(VARLEN) is None:
        return False
    takes = inspect.signature(importlib.import_module(VARLEN).varlen_attn).parameters
    if not {"scale", "window_size", *options} <= takes.keys():
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _by_segment(q, k, v, lengths, k_lengths, options) -> Tensor:
    parts = zip(q.split(lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    outs = [_one(*part, options) for part in parts if len(part[0])]
    return torch.cat(outs) if outs else _one(q, k, v, options)


def _one(q: Tensor, k: Tensor, v: Tensor, options) -> Tensor:
    if not len(k):  # a query without keys gets zeros
        return q[..., :1].expand(-1, -1, v.shape[-1]) * 0
    return reference.attention(q[None], k[None], v[None], **options)[0]


def _padded(q, k, v, segments, keys, options) -> Tensor:
    if not len(q) or not len(k):
        return _one(q, k, v, options)
    k_at, is_key = _places(keys, k)
    queries = q[_places(segments, q)[0]]
    out = reference.attention(queries, k[k_at], v[k_at], is_key, **options)
    cu, token = segments.cu_seqlens, torch.arange(len(q), device=q.device)
    owner = torch.searchsorted(cu, token, right=True) - 1
    return out[owner, token - cu[owner]]


def _places(segments: Segments, x: Tensor) -> tuple[Tensor, Tensor]:
    """Where x has every sequence's tokens, (B, longest), and whether there is one."""
    cu, place = segments.cu_seqlens, torch.arange(segments.max_length, device=x.device)
    return (cu[:-1, None] + place).clamp_max(len(x) - 1), place < cu.diff()[:, None]
