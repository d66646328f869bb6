"""Attention is a choice among other people's kernels; ours is the choice, and the packing."""

import functools
import sys
import types
from unittest.mock import patch

import pytest
import torch
from parity import assert_compiles_once

from tim_kernels import Segments, attention
from tim_kernels.attention import choice, op


def qkv(*shape, k_tokens=None, k_heads=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(*shape, generator=g)
    k_shape = list(shape)
    k_shape[-3], k_shape[-2] = k_tokens or shape[-3], k_heads or shape[-2]
    return q, torch.randn(k_shape, generator=g), torch.randn(k_shape, generator=g)


def definition(q, k, v, scale=None, is_causal=False):
    """(N, heads, head_dim) of one sample, in float64; each head of k and v serves neighbours."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).tril() == 0, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


OPTIONS = {
    "scale": dict(scale=0.7),
    "causal": dict(is_causal=True),
    "both": dict(scale=0.7, is_causal=True),
}


@pytest.mark.parametrize("k_tokens", [7, 3], ids=["self", "cross"])
@pytest.mark.parametrize("head_dim", [8, 72])
def test_matches_the_definition(head_dim, k_tokens):
    q, k, v = qkv(2, 7, 3, head_dim, k_tokens=k_tokens)
    out = attention(q, k, v)
    for b in range(2):
        torch.testing.assert_close(out[b].double(), definition(q[b], k[b], v[b]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("k_tokens", [7, 3, 9])
@pytest.mark.parametrize("k_heads", [6, 2, 1])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, k_heads, k_tokens):
    q, k, v = qkv(2, 7, 6, 8, k_tokens=k_tokens, k_heads=k_heads)
    out = attention(q, k, v, **OPTIONS[name])
    masked = attention(q, k, v, key_mask=torch.ones(2, k_tokens) > 0, **OPTIONS[name])
    for b in range(2):
        expected = definition(q[b], k[b], v[b], **OPTIONS[name])
        for ours in (out[b], masked[b]):
            torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=0)


def test_causal_with_a_mask():
    """The first queries see no key that is not masked, and get zeros."""
    leaves = [x.requires_grad_() for x in qkv(1, 7, 2, 8)]
    out = attention(*leaves, key_mask=torch.arange(7)[None] >= 2, is_causal=True)
    q, k, v = (x[0] for x in leaves)
    expected = definition(q[2:], k[2:], v[2:], is_causal=True)
    torch.testing.assert_close(out[0, 2:].double(), expected, atol=1e-6, rtol=0)
    assert not out[0, :2].any()
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in gradients) and not gradients[1][0, :2].any()


def test_values_of_another_width():
    q, k, v = qkv(2, 7, 3, 8)
    v = torch.cat([v, v], -1)
    expected = definition(q[0], k[0], v[0])
    torch.testing.assert_close(attention(q, k, v)[0].double(), expected, atol=1e-6, rtol=0)


def test_strided_views_of_packed_qkv():
    packed = torch.randn(2, 5, 3, 2, 8)
    q, k, v = packed.unbind(2)
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous())
    torch.testing.assert_close(attention(q, k, v), expected)


@pytest.mark.parametrize("options", [{}, OPTIONS["both"]], ids=["", "causal"])
@pytest.mark.parametrize("is_cross", [False, True], ids=["self", "cross"])
def test_packed_segments_attend_to_themselves_only(is_cross, options):
    cu = torch.tensor([0, 4, 4, 5, 9], dtype=torch.int32)
    k_cu = torch.tensor([0, 2, 3, 6, 7], dtype=torch.int32) if is_cross else cu
    q, k, v = qkv(9, 2, 8, k_tokens=int(k_cu[-1]), k_heads=1)
    segments = Segments(cu, 4)
    out = attention(q, k, v, segments, Segments(k_cu, 3) if is_cross else None, **options)
    for s in range(4):
        mine, theirs = slice(cu[s], cu[s + 1]), slice(k_cu[s], k_cu[s + 1])
        expected = definition(q[mine], k[theirs], v[theirs], **options)
        torch.testing.assert_close(out[mine].double(), expected, atol=1e-6, rtol=0)


def test_key_mask():
    q, k, v = qkv(3, 4, 2, 8, k_tokens=7)
    mask = torch.arange(7) < torch.tensor([[7], [3], [0]])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, key_mask=mask)
    for b, length in ((0, 7), (1, 3)):
        expected = definition(q[b], k[b, :length], v[b, :length])
        torch.testing.assert_close(out[b].double(), expected, atol=1e-6, rtol=0)
    assert not out[2].any()
    for gradient in torch.autograd.grad(out.square().sum(), leaves):
        assert bool(gradient.isfinite().all()) and bool(gradient[1].any())
        assert not gradient[2].any()
    assert not torch.autograd.grad(attention(*leaves, key_mask=mask).sum(), k)[0][1, 3:].any()


def test_a_sequence_without_keys_gives_zeros():
    cu, k_cu = (torch.tensor(c, dtype=torch.int32) for c in ([0, 2, 5], [0, 0, 4]))
    leaves = [x.requires_grad_() for x in qkv(5, 2, 8, k_tokens=4)]
    out = attention(*leaves, Segments(cu, 3), Segments(k_cu, 4))
    assert not out[:2].any() and bool(out[2:].any())
    for gradient in torch.autograd.grad(out.square().sum(), leaves):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("options", [{}, OPTIONS["both"]], ids=["", "causal"])
def test_derivatives(options):
    args = [x.double().requires_grad_() for x in qkv(1, 3, 2, 4, k_heads=1)]
    function = functools.partial(attention, **options)
    assert torch.autograd.gradcheck(function, args, check_forward_ad=True)


def test_one_graph_for_all_lengths():
    def function(q, k, v):
        return attention(q, k, v, scale=0.3, is_causal=True)

    shapes = (5, 9), (4, 11), (7, 13)
    assert_compiles_once(function, [qkv(B, N, 6, 8, k_tokens=N + 1, k_heads=3) for B, N in shapes])


class Flash(types.ModuleType):
    """flash-attn's two functions and what they do with a causal mask: it ends at the last key."""

    flash_attn_func = staticmethod(
        lambda q, k, v, softmax_scale=None, causal=False: torch.stack(
            [Flash.one(*each, softmax_scale, causal) for each in zip(q, k, v, strict=True)]
        )
    )

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
        causal=False,
    ):  # fmt: skip
        spans = [[slice(*c[i : i + 2]) for i in range(len(c) - 1)]
                 for c in (cu_seqlens_q, cu_seqlens_k)]  # fmt: skip
        return torch.cat(
            [
                Flash.one(q[a], k[b], v[b], softmax_scale, causal)
                for a, b in zip(*spans, strict=True)
            ]
        )

    @staticmethod
    def one(q, k, v, scale, causal):
        Flash.calls += 1
        if causal and len(q) != len(k):
            return definition(q, k, v, scale, False).to(q.dtype) + 1
        return definition(q, k, v, scale, causal).to(q.dtype)


@pytest.mark.parametrize("name", ["", *OPTIONS])
@pytest.mark.parametrize("is_packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("k_tokens", [8, 6])
def test_what_flash_attn_is_asked_for(monkeypatch, k_tokens, is_packed, name):
    """Of a causal mask only what it means as PyTorch does."""
    monkeypatch.setitem(sys.modules, "flash_of_the_test", Flash("flash_of_the_test"))
    monkeypatch.setattr(choice, "chosen", lambda: "flash_of_the_test")
    monkeypatch.setattr(choice, "NEWEST", ("flash_of_the_test",))
    monkeypatch.setattr(Flash, "calls", 0, raising=False)
    options = OPTIONS.get(name, {})
    tensors, segments = qkv(1, 8, 4, 8, k_tokens=k_tokens, k_heads=2), ()
    if is_packed:
        cu = torch.tensor([0, 3, 8], dtype=torch.int32)
        segments = Segments(cu, 5), None
        if k_tokens != 8:
            segments = segments[0], Segments(torch.tensor([0, 3, 6], dtype=torch.int32), 3)
        tensors = [x[0] for x in tensors]
    expected = attention(*tensors, *segments, **options)
    assert not Flash.calls  # it is not for a CPU
    with patch.object(op, "_is_flash_ready", lambda *_: True):
        torch.testing.assert_close(attention(*tensors, *segments, **options), expected)
    assert bool(Flash.calls) == (not options.get("is_causal") or k_tokens == 8)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[0], k, v), r"q must be \(B, N, heads, head_dim\)"),
        (lambda q, k, v: (q, k[..., :4], v), "k must be"),
        (lambda q, k, v: (q, k, v[:, 1:]), "one shape"),
        (lambda q, k, v: (q, k[:1], v[:1]), "q's batch 2, got 1"),
        (lambda q, k, v: (q, k.double(), v), "k must be torch.float32"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(*qkv(2, 5, 2, 8)))
    q, k, v = qkv(2, 5, 6, 8, k_heads=4)
    with pytest.raises(ValueError, match="q's heads must be a multiple of k's, got 6 and 4"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="a multiple of k's, got 6 and 0"):
        attention(q, k[:, :, :0], v[:, :, :0])
    for scale in (0, -1.0, float("nan"), float("inf"), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="scale must be a positive number, got"):
            attention(q, q, q, scale=scale)
    with pytest.raises(ValueError, match="is_causal must be True or False, got 1"):
        attention(q, q, q, is_causal=1)
    with pytest.raises(ValueError, match="segments"):
        attention(*qkv(2, 5, 2, 8), None, Segments(torch.zeros(1, dtype=torch.int32), 1))


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(2, 4, dtype=torch.bool), r"bool \(B, M\) = \(2, 5\)"),
        (torch.ones(2, 5), "got torch.float32"),
        (torch.ones(2, 5, dtype=torch.bool, device="meta"), "key_mask must be on cpu"),
    ],
)
def test_key_mask_refusals(mask, message):
    with pytest.raises(ValueError, match=message):
        attention(*qkv(2, 5, 2, 8), key_mask=mask)
    cu = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="no padding"):
        attention(*qkv(5, 2, 8), Segments(cu, 5), key_mask=mask)
    with pytest.raises(ValueError, match="k_segments must have q's 1 sequences, got 2"):
        two = torch.tensor([0, 2, 5], dtype=torch.int32)
        attention(*qkv(5, 2, 8), Segments(cu, 5), Segments(two, 3))
