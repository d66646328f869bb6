"""Attention is a choice among other people's kernels; ours is the choice, and the packing."""

import pytest
import torch

from tim_kernels import Segments, attention


def qkv(*shape, k_tokens=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(*shape, generator=g)
    k_shape = list(shape)
    k_shape[-3] = k_tokens or shape[-3]
    return q, torch.randn(k_shape, generator=g), torch.randn(k_shape, generator=g)


def definition(q, k, v):
    """(N, heads, head_dim) of one sample, in float64."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("k_tokens", [7, 3], ids=["self", "cross"])
@pytest.mark.parametrize("head_dim", [8, 72])
def test_matches_the_definition(head_dim, k_tokens):
    q, k, v = qkv(2, 7, 3, head_dim, k_tokens=k_tokens)
    out = attention(q, k, v)
    for b in range(2):
        torch.testing.assert_close(out[b].double(), definition(q[b], k[b], v[b]), atol=1e-6, rtol=0)


def test_strided_views_of_packed_qkv():
    packed = torch.randn(2, 5, 3, 2, 8)
    q, k, v = packed.unbind(2)
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous())
    torch.testing.assert_close(attention(q, k, v), expected)


@pytest.mark.parametrize("is_cross", [False, True], ids=["self", "cross"])
def test_packed_segments_attend_to_themselves_only(is_cross):
    cu = torch.tensor([0, 4, 4, 5, 9], dtype=torch.int32)
    k_cu = torch.tensor([0, 2, 3, 6, 7], dtype=torch.int32) if is_cross else cu
    q, k, v = qkv(9, 2, 8, k_tokens=int(k_cu[-1]))
    segments = Segments(cu, 4)
    out = attention(q, k, v, segments, Segments(k_cu, 3) if is_cross else None)
    for s in range(4):
        mine, theirs = slice(cu[s], cu[s + 1]), slice(k_cu[s], k_cu[s + 1])
        expected = definition(q[mine], k[theirs], v[theirs])
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


def test_derivatives():
    args = [x.double().requires_grad_() for x in qkv(1, 3, 2, 4)]
    assert torch.autograd.gradcheck(attention, args, check_forward_ad=True)


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
