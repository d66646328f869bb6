"""Attention: a choice among the kernels others keep well; its tangent is our own."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ..checks import check_floating, check_tokens, is_double
from ..dispatch.backend import Op, choose
from ..dispatch.operators import NO_TANGENT, Operator
from ..dispatch.slices import each_slice
from ..dispatch.torch_private import (
    has_graph,
    has_tangent,
    is_forward_mode,
    is_mapped,
    is_transformed,
)
from ..launch.plans import Plans, signature
from ..segments import Segments, packing, unpacked
from . import backward, choice, packed, reference


def _triton():
    from . import triton

    return triton


OP = Op("attention", _triton)
HEAD_DIMS = range(8, 257, 8)  # of our kernel and of flash-attn


def _jvp_fake(
    q, k, v, tq, tk, tv, key_mask, cu, k_cu, max_length, k_max_length, scale=None,
    is_causal=False, has_lse=False,
):  # fmt: skip
    lse = q.new_empty(backward.lse_shape(q), dtype=torch.float32) if has_lse else q.new_empty(0)
    return q.new_empty(q.shape), q.new_empty(q.shape), lse


jvp_op = Operator(
    OP,
    "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? tq, Tensor? tk, Tensor? tv, "
    "Tensor? key_mask, Tensor? cu_seqlens, Tensor? k_cu_seqlens, SymInt max_length, "
    "SymInt k_max_length, float? scale=None, bool is_causal=False, bool has_lse=False) "
    "-> (Tensor, Tensor, Tensor)",
    _jvp_fake,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments | None = None,
    k_segments: Segments | None = None,
    key_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """softmax(scale·q·kᵀ)·v, without dropout (arXiv 1706.03762, equation 1).

    Args:
        q: (B, N, heads, head_dim), or (T, heads, head_dim) packed with `segments`.
        k, v: (B, M, heads, head_dim), or (S, heads, head_dim) packed with `k_segments`, which
            are `segments` unless given. Their heads may be fewer, a divisor of q's: neighbours
            among q's heads then share one (arXiv 2305.13245). v may have a head_dim of its own.
        key_mask: bool (B, M), True for the keys to attend to; not with `segments`. What is masked
            must be finite. A query without keys gets zeros, in value and derivatives.
        scale: a positive number, 1/√head_dim unless given.
        is_causal: query i attends to the keys 0 … i of its sample, also where N ≠ M.

    Runs flash-attn where it is installed and can (CUDA, bfloat16 or float16, no key_mask, one
    head_dim; if causal, the queries' lengths are the keys'), or what `set_attention` chose, else
    PyTorch's scaled_dot_product_attention; of packed tokens flash-attn alike, PyTorch's varlen_attn
    where flash-attn could run, else a sequence after the other, or padded to the longest where the
    lengths are not known on the host (torch.compile, meta tensors, `Segments` with a `total` on a
    GPU). No mask grows with T². Returns q's shape with v's head_dim, and q's dtype.

    Under forward mode (torch.func.jvp, torch.autograd.forward_ad) our Triton kernel makes the
    output and its tangent in one pass over the keys, in memory that grows with N, for float32,
    bfloat16 and float16 and one head_dim that is a multiple of 8 up to 256; any other goes to
    PyTorch's composite implementation, in memory that grows with N·M. That output has a gradient
    as ever: from the log-sum-exp that the kernel keeps, by PyTorch's flash attention where plain
    attention would be that or flash-attn 2, for float32 (B, N, …) by its efficient attention; else
    by the plain attention made anew in backward. Its tangent is a constant, and a request to
    differentiate through it raises. `forward_mode` does the same for networks that call
    PyTorch's scaled_dot_product_attention.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        NotImplementedError: a live tangent inside torch.compile, or a gradient of the tangent.

    Example:
        >>> q, k, v = torch.randn(3, 2, 16, 4, 32)
        >>> tangents = torch.randn(3, 2, 16, 4, 32).unbind()
        >>> out, tangent = torch.func.jvp(attention, (q, k, v), tangents)
    """
    if segments is None and k_segments is not None:
        raise ValueError("k_segments need segments: queries and keys are packed together")
    if k_segments is segments:
        k_segments = None
    cu, max_length = packing(segments, "q", q)
    k_cu, k_max_length = packing(k_segments or segments, "k", k)
    args = q, k, v, key_mask, cu, k_cu, max_length, k_max_length, scale, is_causal
    if torch.compiler.is_compiling():
        _check(*args)
    else:
        _checked.find(signature(args), _check, *args)
    if is_forward_mode() and not is_mapped((q, k, v)):
        duals = [forward_ad.unpack_dual(x) for x in (q, k, v)]
        if any(dual.tangent is not None for dual in duals) and _has_kernel(q, v):
            return _dual_attention(duals, segments, k_segments, key_mask, scale, is_causal)
    return _plain_attention(q, k, v, segments, k_segments, key_mask, scale, is_causal)


_checked = Plans()  # by signature


def _plain_attention(q, k, v, segments, k_segments, key_mask, scale, is_causal) -> Tensor:
    is_flash = key_mask is None and _is_flash_ready(q, k, v)
    is_flash = is_flash and _counts_alike(q, k, segments, k_segments, is_causal)
    name = choice.chosen() if is_flash else "native"
    flash = choice.package(name)
    if flash is None and segments is not None:
        return packed.attention(
            q, k, v, segments, k_segments, scale=scale, is_causal=is_causal, has_flash=is_flash
        )
    if flash is None:
        out = choice.by_itself(name, q, k, v, scale, is_causal)
        if out is not None:
            return out
        return reference.attention(q, k, v, key_mask, scale=scale, is_causal=is_causal)
    options = {} if scale is None else dict(softmax_scale=scale)
    if is_causal:
        options["causal"] = True
    if segments is None:
        out = flash.flash_attn_func(q, k, v, **options)
    else:
        keys = k_segments or segments
        out = flash.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=segments.cu_seqlens, cu_seqlens_k=keys.cu_seqlens,
            max_seqlen_q=segments.max_length, max_seqlen_k=keys.max_length, **options,
        )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out  # flash-attn 4 adds the log-sum-exp


def _counts_alike(q, k, segments, k_segments, is_causal) -> bool:
    """Whether flash attention, which counts from the last key, masks as we do."""
    if not is_causal:
        return True
    return q.shape[:-2] == k.shape[:-2] if segments is None else k_segments is None


def _is_pytorch_s_flash(tensors) -> bool:
    """Whether the backward of plain attention is PyTorch's flash attention, or flash-attn 2, which
    has the same kernels; the others have their own, which are faster."""
    half = tensors[0].dtype in (torch.bfloat16, torch.float16)
    is_gpu = tensors[0].device.type == "cuda"
    return not (half and is_gpu) or choice.chosen() in ("native", "flash", "flash_attn")


def _has_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether our kernel makes the tangent."""
    if q.shape[-1] not in HEAD_DIMS or v.shape[-1] != q.shape[-1] or is_double(q):
        return False
    is_plain = type(q) in (Tensor, torch.nn.Parameter) and not q.is_meta
    is_real = is_plain and not torch.compiler.is_compiling()
    return choose(OP.name, q.device.type, is_real) != "reference"


def _dual_attention(duals, segments, k_segments, key_mask, scale, is_causal) -> Tensor:
    if torch.compiler.is_compiling():
        raise NotImplementedError(NO_TANGENT.format(OP.name))
    primals = [dual.primal for dual in duals]
    numbers = scale, is_causal
    cu, max_length = packing(segments, "q", primals[0])
    k_cu, k_max_length = packing(k_segments or segments, "k", primals[1])
    way = None
    if key_mask is None and has_graph(primals):
        is_flash = _is_pytorch_s_flash(primals) and _counts_alike(
            *primals[:2], segments, k_segments, is_causal
        )
        way = backward.way(*primals, segments is not None, is_causal, is_flash)
    out, tangent, lse = jvp_op(
        *primals, *(dual.tangent for dual in duals), key_mask, cu, k_cu, max_length, k_max_length,
        *numbers, way is not None,
    )  # fmt: skip
    k_cu, k_max_length = packing(k_segments, "k", primals[1])
    out = _Primal.apply(
        out.detach(), lse.detach(), *primals, key_mask, cu, k_cu, max_length, k_max_length,
        *numbers, way,
    )  # fmt: skip
    return forward_ad.make_dual(out, tangent)


class _Primal(torch.autograd.Function):
    """`out` as it is, with the gradients of the plain attention that it is the value of: by `way`
    of its log-sum-exp, or of the attention made anew."""

    @staticmethod
    def forward(out, lse, q, k, v, key_mask, cu, k_cu, *numbers):
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        out, lse, q, k, v, key_mask, cu, k_cu, *ctx.numbers = inputs
        kept = (None, None) if ctx.numbers[-1] is None else (out, lse)
        ctx.save_for_backward(q, k, v, key_mask, cu, k_cu, *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *primals, key_mask, cu, k_cu, out, lse = ctx.saved_tensors
        *lengths, scale, is_causal, way = ctx.numbers
        if way is not None:
            gradients = backward.gradients(
                way, dout, *primals, out, lse, cu, k_cu, *lengths, scale, is_causal
            )
            return None, None, *gradients, *(None,) * 8
        segments, k_segments = map(unpacked, (cu, k_cu), lengths, primals[:2])
        leaves = [x.detach().requires_grad_() for x in primals]
        with torch.enable_grad():
            out = _plain_attention(*leaves, segments, k_segments, key_mask, scale, is_causal)
        return None, None, *torch.autograd.grad(out, leaves, dout), *(None,) * 8

    @staticmethod
    def vmap(info, in_dims, *args):
        return each_slice(_Primal.apply, info, in_dims, *args)


def _is_flash_ready(*tensors: Tensor) -> bool:
    q = tensors[0]
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] in HEAD_DIMS
        and tensors[-1].shape[-1] == q.shape[-1]
        and not has_tangent(tensors)
        and not is_transformed()
    )


def _check(q, k, v, key_mask, cu, k_cu, max_length, k_max_length, scale, is_causal) -> bool:
    ndim, layout = (4, "(B, N, heads, head_dim)") if cu is None else (3, "(T, heads, head_dim)")
    check_floating("q", q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != ndim or (name != "v" and x.shape[-1] != q.shape[-1]):
            raise ValueError(
                f"{name} must be {layout} with q's heads and head_dim {tuple(q.shape[-2:])}; "
                f"got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}"
            )
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"k and v must have one shape but for head_dim, got {tuple(k.shape)}, {tuple(v.shape)}"
        )
    heads, k_heads = q.shape[-2], k.shape[-2]
    if heads % k_heads if k_heads else heads:
        raise ValueError(f"q's heads must be a multiple of k's, got {heads} and {k_heads}")
    if scale is not None and (isinstance(scale, Tensor) or not 0 < scale < float("inf")):
        raise ValueError(f"scale must be a positive number, got {scale}")
    if not isinstance(is_causal, bool):
        raise ValueError(f"is_causal must be True or False, got {is_causal}")
    if cu is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have q's batch {q.shape[0]}, got {k.shape[0]}")
    if cu is not None:
        samples = check_tokens("q", q, cu)
        k_samples = check_tokens("k", k, k_cu)
        if samples != k_samples:
            raise ValueError(f"k_segments must have q's {samples} sequences, got {k_samples}")
    if key_mask is not None:
        if cu is not None:
            raise ValueError("packed tokens have no padding: key_mask goes with (B, N, …) alone")
        if key_mask.shape != k.shape[:2] or key_mask.dtype != torch.bool:
            raise ValueError(
                f"key_mask must be bool (B, M) = {tuple(k.shape[:2])}, "
                f"got {key_mask.dtype} {tuple(key_mask.shape)}"
            )
        if key_mask.device != q.device:
            raise ValueError(f"key_mask must be on {q.device} like q, got {key_mask.device}")
    return True
