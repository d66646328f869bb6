"""Self- and cross-attention of TiM's blocks, as functions of modules with the published names.

Norms of heads, positions and shifts are one op where the norms are plain; the per-sample bias of
the values passes through attention as a constant, since softmax rows sum to one. Tokens are
(B, N, C), or packed (T, C), of pictures that `Rope` describes.
"""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.op import attention
from ..qk_norm_rope.op import qk_norm_rope, qkv_norm_rope
from ..segments import Segments, per_token
from .fp8_linear import Fp8Tokens
from .layers import (
    add_product,
    beside_path,
    bias_path,
    computes,
    ends_in_residual,
    is_plain,
    is_quiet,
    takes_fp8,
    with_path,
)


class Rope(NamedTuple):
    """Where tokens sit, see `qk_norm_rope`: all samples on one `grid`, or packed in `segments`,
    each on its own of `sizes`; `text` are then the segments of their texts, at `text_places` of
    all (None: everything). And whether biases may have their gradients by `bias_path`, and anything
    a gradient: blocks that are run again in backward must not ask for themselves."""

    grid: tuple[int, int] | None
    order: str
    sizes: Tensor | None = None  # int32 (B, 2)
    segments: Segments | None = None
    text: Segments | None = None
    text_places: Tensor | None = None
    paths: bool = False
    gradients: bool = False

    @property
    def positions(self) -> dict[str, Any]:
        """As `qk_norm_rope` takes them."""
        return dict(grid=self.grid, sizes=self.sizes, order=self.order, segments=self.segments)


class Pending(NamedTuple):
    """A sub-layer's output (B, N, C) that is not yet added, its gate and its bias (B, C)."""

    branch: Tensor
    gate: Tensor
    bias: Tensor | None = None


class TextKeys(NamedTuple):
    """The text as one block's cross-attention reads it, (B, L, heads, head_dim) both."""

    k: Tensor
    v: Tensor


class NormedText(NamedTuple):
    """The text (B, L, C) behind the norm that all blocks share."""

    tokens: Tensor


class Shifts(NamedTuple):
    """What is added to every token's q, k and v, (B, C) each; None without qkv_d.

    v's reaches the output as `v`, added to the values, or, since softmax rows sum to one, as
    `bias`, its product with the output projection's weight, added to what that puts out.
    The paths of the biases of qkv and proj, see `bias_path`, are in them where it says so.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    has_qkv_path: bool = False
    has_proj_path: bool = False


def shifts_of(attn: nn.Module, delta: Tensor, paths: bool) -> Shifts:
    """What delta (B, C) adds; `paths` as in `Rope`."""
    of_qkv, of_proj = _paths(attn) if paths else (None, None)
    has = of_qkv is not None, of_proj is not None
    rows = attn.qkv_d(delta) if getattr(attn, "qkv_d", None) is not None else None
    if rows is None and of_qkv is None:
        return Shifts(None, None, None, _sum(None, of_proj), *has)
    q, k, v = _sum(rows, of_qkv).chunk(3, dim=-1)
    if takes_fp8(attn, "proj"):
        return Shifts(q, k, bias=attn.proj.without_bias(v))
    if not (is_plain(attn.proj) and is_quiet(attn)):
        return Shifts(q, k, v)
    weight = attn.proj.weight if rows is not None else attn.proj.weight.detach()  # v is zero
    return Shifts(q, k, None, _sum(F.linear(v, weight), of_proj), *has)


def _paths(attn: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Of the biases of qkv, where the kernel adds rows to q and k and the values' passes proj, and
    of proj."""
    if not computes(attn, self_attention):
        return None, None
    of_qkv = bias_path(attn.qkv) if _is_fused(attn) and is_plain(attn.proj) else None
    return of_qkv, bias_path(attn.proj)


def _sum(rows: Tensor | None, path: Tensor | None) -> Tensor | None:
    """Rows (B, C) and a path (C,); alone it is (1, C)."""
    if path is None:
        return rows
    return path.unsqueeze(0) if rows is None else rows + path.to(rows.dtype)


def self_attention(attn: nn.Module, h: Tensor | Fp8Tokens, shifts: Shifts, rope: Rope) -> Tensor:
    """Self-attention of tokens (B, N, C) or (T, C), without `shifts.bias`."""
    out = _attend(attn, h, shifts, rope)
    return beside_path(attn.proj, out) if shifts.has_proj_path else attn.proj(out)


def attention_branch(
    attn: nn.Module, x: Tensor, h: Tensor | Fp8Tokens, shifts: Shifts, rope: Rope, gate: Tensor
) -> tuple[Tensor, Pending | None]:
    """x and what the attention of h is to add to it; nothing where its last product does."""
    if not rope.gradients and ends_in_residual(attn, self_attention, attn.proj, x, rope.segments):
        out = _attend(attn, h, shifts, rope)
        return add_product(attn.proj, out, x, gate, shifts.bias, rope.segments), None
    return x, Pending(attn(h, shifts, rope), gate, shifts.bias)


def _attend(attn: nn.Module, h: Tensor | Fp8Tokens, shifts: Shifts, rope: Rope) -> Tensor:
    """The attention without the output projection."""
    qkv = beside_path(attn.qkv, h) if shifts.has_qkv_path else attn.qkv(h)
    qkv = qkv.unflatten(-1, (3, _heads(attn, h.shape[-1]), -1))
    if _is_fused(attn):
        q, k, v = qkv_norm_rope(
            qkv, *_affine(attn.q_norm), *_affine(attn.k_norm), **rope.positions,
            q_shift=shifts.q, k_shift=shifts.k, eps=_eps(attn.q_norm),
        )  # fmt: skip
    else:
        q, k, v = qkv.unbind(-3)
        q = _call_norm(attn.q_norm, _shifted(q, shifts.q, rope))
        k = _call_norm(attn.k_norm, _shifted(k, shifts.k, rope))
        q, k = qk_norm_rope(q, k, **rope.positions)
    return attention(q, k, _shifted(v, shifts.v, rope), rope.segments).flatten(-2)


def _is_fused(attn: nn.Module) -> bool:
    """Whether `qkv_norm_rope` computes both norms."""
    is_fused = is_head_norm(attn.q_norm) and is_head_norm(attn.k_norm)
    return is_fused and _eps(attn.q_norm) == _eps(attn.k_norm)


def cross_attention(
    attn: nn.Module, h: Tensor | Fp8Tokens, text: Tensor | NormedText | TextKeys, rope: Rope
) -> Tensor:
    """Tokens (B, N, C) or (T, C) attend to normed text (B, L, C), or to its keys and values."""
    return attn.proj(_attend_to_text(attn, attn.q(h), None, text, rope))


def cross_branch(
    attn: nn.Module, x: Tensor, h: Tensor | Fp8Tokens, text, rope: Rope, gate: Tensor
) -> tuple[Tensor, Pending | None]:
    """As `attention_branch`, with the paths of the biases of q and proj."""
    if not rope.gradients and ends_in_residual(attn, cross_attention, attn.proj, x, rope.segments):
        out = _attend_to_text(attn, attn.q(h), None, text, rope)
        return add_product(attn.proj, out, x, gate, None, rope.segments), None
    if not (rope.paths and computes(attn, cross_attention)):
        return x, Pending(attn(h, text, rope), gate)
    q, shift = with_path(attn.q, h) if is_head_norm(attn.q_norm) else (attn.q(h), None)
    out, path = with_path(attn.proj, _attend_to_text(attn, q, shift, text, rope))
    return x, Pending(out, gate, path)


def _attend_to_text(
    attn: nn.Module, q: Tensor, shift: Tensor | None, text: Tensor | NormedText | TextKeys,
    rope: Rope,
) -> Tensor:  # fmt: skip
    """The attention of q (…, C), to which a row is added, without the output projection."""
    text = text.tokens if isinstance(text, NormedText) else text
    q = q.unflatten(-1, (_heads(attn, q.shape[-1]), -1))
    q = _norm_rope(attn.q_norm, q, rope, shift)
    k, v = text if isinstance(text, TextKeys) else keys_and_values(attn, text)
    if rope.segments is not None:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    if rope.text_places is not None:
        k, v = k[rope.text_places], v[rope.text_places]
    return attention(q, k, v, rope.segments, rope.text).flatten(-2)


def keys_and_values(attn: nn.Module, text: Tensor) -> TextKeys:
    k, v = attn.kv(text).unflatten(-1, (2, _heads(attn, text.shape[-1]), -1)).unbind(2)
    return TextKeys(_norm_rope(attn.k_norm, k), v)


def _norm_rope(
    norm: nn.Module, x: Tensor, rope: Rope | None = None, shift: Tensor | None = None
) -> Tensor:
    """A head norm of x (…, heads, head_dim), turned by its positions if there are any. A norm that
    is called takes no shift."""
    if not is_head_norm(norm):
        x, norm = _call_norm(norm, x), None
    if rope is None and (norm is None or _affine(norm)[0] is None):
        return x
    positions = {} if rope is None else rope.positions
    return qk_norm_rope(x, None, *_affine(norm), q_shift=shift, eps=_eps(norm), **positions)


def is_head_norm(norm: nn.Module) -> bool:
    """Whether a head norm is one that `qk_norm_rope` computes."""
    if is_plain(norm, nn.LayerNorm):
        return norm.weight is not None and norm.weight.ndim == 1
    return is_plain(norm, nn.Identity)


def _call_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """As published: (B, heads, N, head_dim)."""
    if x.ndim == 3:  # packed
        return _call_norm(norm, x[None])[0]
    return norm(x.transpose(1, 2)).transpose(1, 2).contiguous()


def _shifted(x: Tensor, shift: Tensor | None, rope: Rope) -> Tensor:
    if shift is None:
        return x
    return x + per_token(shift, x, rope.segments).unflatten(-1, x.shape[-2:])


def _heads(attn: nn.Module, width: int) -> int:
    return getattr(attn, "num_heads", None) or width // attn.q_norm.weight.shape[0]


def _affine(norm: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    return getattr(norm, "weight", None), getattr(norm, "bias", None)


def _eps(norm: nn.Module | None) -> float:
    return getattr(norm, "eps", 1e-5)
