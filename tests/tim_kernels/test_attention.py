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
