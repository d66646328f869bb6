"""Which attention packed sequences get, and that none of them makes a mask of all pairs."""

import inspect
import sys
import types

import pytest
import torch
import torch._dynamo.testing
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

import tim_kernels
from tim_kernels import Segments, attention
from tim_kernels.attention import choice, op, packed

LENGTHS, K_LENGTHS = [40, 0, 25, 3, 60], [7, 2, 5, 0, 9]
OPTIONS = [{}, dict(scale=0.3, is_causal=True)]


def problem(k_lengths=None, heads=2, device="cpu"):
    g = torch.Generator().manual_seed(0)
    shapes = [
        (sum(lengths), n, 8) for lengths, n in ((LENGTHS, 4), *[(k_lengths or LENGTHS, heads)] * 2)
    ]
    tensors = [torch.randn(shape, generator=g).to(device) for shape in shapes]
    segments = Segments.from_lengths(LENGTHS, device)
    return tensors, segments, k_lengths and Segments.from_lengths(k_lengths, device)


def unread(segments):
    """As on a GPU, whose lengths nobody has read."""
    made = object.__new__(Segments)
    vars(made).update(vars(segments) | dict(lengths=None))
    return made


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return out


@pytest.mark.parametrize("options", OPTIONS, ids=["", "causal"])
@pytest.mark.parametrize("k_lengths", [None, K_LENGTHS], ids=["self", "cross"])
def test_padded_equals_segment_by_segment(k_lengths, options):
    """In value, gradients and tangent; a sequence without keys gets zeros."""
    tensors, segments, k_segments = problem(k_lengths)
    leaves = [x.requires_grad_() for x in tensors]

    def run(*segments):
        def function(*qkv):
            return packed.attention(*qkv, *segments, **options)

        out = function(*leaves)
        tangent = torch.func.jvp(function, tuple(tensors), tuple(x.cos() for x in tensors))[1]
        return out, *torch.autograd.grad(out.square().sum(), leaves), tangent

    expected = run(segments, k_segments)
    ours = run(unread(segments), k_segments and unread(k_segments))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
    if k_lengths:
        assert not expected[0][65:68].any() and expected[0][68:].any()


def test_nothing_grows_with_the_square():
    """16 sequences of 64: all pairs would be a million."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1024, 1, 8, generator=g, requires_grad=True)
    segments = Segments.from_lengths([64] * 16)
    for each in (segments, unread(segments)):
        with Largest() as largest:
            attention(q, q, q, each).sum().backward()
        assert largest.elements <= 16 * 64 * 64  # of one head: a sample's own pairs at most
        with Largest() as largest:
            torch.func.jvp(lambda q, each=each: attention(q, q, q, each), (q,), (q.cos(),))
        assert largest.elements <= 16 * 64 * 64


def test_the_way():
    _, segments, k_segments = problem(K_LENGTHS)
    assert packed.way(segments, k_segments, False) == "segments"
    assert packed.way(segments, unread(k_segments), False) == "padded"
    assert packed.way(segments, k_segments, True) == "segments"  # there is no such GPU
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "has_varlen", lambda: True)
        assert packed.way(segments, k_segments, True) == "varlen"
        assert packed.way(segments, k_segments, False) == "segments"  # as for float32


@pytest.mark.parametrize("name", ["", "flash_of_the_test"])
def test_explain_says_which(monkeypatch, name):
    def line():
        (found,) = (row for row in tim_kernels.explain().splitlines() if "packed tokens" in row)
        return found

    assert "one sequence after the other" in line()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    packed.has_varlen.cache_clear()
    monkeypatch.setattr(choice, "chosen", lambda: name or "native")
    if name:
        monkeypatch.setattr(choice, "NEWEST", (name,))
    try:
        assert ("flash_of_the_test for" if name else "varlen_attn for bfloat16") in line()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        packed.has_varlen.cache_clear()
        assert name or "not varlen_attn" in line()
    finally:
        packed.has_varlen.cache_clear()


@pytest.mark.parametrize("options", OPTIONS, ids=["", "causal"])
@pytest.mark.parametrize("k_lengths", [None, K_LENGTHS], ids=["self", "cross"])
@pytest.mark.parametrize("heads", [4, 2], ids=["", "grouped"])
def test_what_varlen_attn_is_asked_for(monkeypatch, heads, k_lengths, options):
    """By its own signature, since no GPU is here to run it. Groups are newer than it."""
    asked, signature = [], inspect.signature(varlen_attn)

    def stand_in(*args, **others):
        asked.append(signature.bind(*args, **others).arguments)
        return packed.attention(
            *args[:3], Segments(args[3], args[5]), Segments(args[4], args[6]),
            scale=others["scale"], is_causal=others["window_size"] == (-1, 0),
        )  # fmt: skip

    module = types.ModuleType(packed.VARLEN)
    module.varlen_attn = stand_in
    tensors, segments, k_segments = problem(k_lengths, heads)
    expected = attention(*tensors, segments, k_segments, **options)
    monkeypatch.setitem(sys.modules, packed.VARLEN, module)
    monkeypatch.setattr(
        packed, "has_varlen", lambda *options: {*options} <= {*signature.parameters}
    )
    monkeypatch.setattr(op, "_is_flash_ready", lambda *_: True)
    ours = attention(*tensors, segments, k_segments, **options)
    is_asked = heads == 4 or "enable_gqa" in signature.parameters
    is_asked = is_asked and not (k_lengths and options)  # causal, keys of other lengths
    assert torch.equal(ours, expected) and len(asked) == is_asked
    for given in asked:
        assert given["cu_seq_q"] is segments.cu_seqlens
        assert given.get("enable_gqa", False) == (heads == 2)
        assert (given["max_q"], given["max_k"]) == (60, 9 if k_lengths else 60)


def test_one_graph_for_all_lengths(one_thread):
    def function(qkv, segments):
        return attention(*qkv.unbind(1), segments)

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=frames, fullgraph=True, dynamic=True)
    for lengths in ([4, 6, 1, 3], [3, 9, 2], [7, 2, 5, 5, 1]):
        qkv = torch.randn(sum(lengths), 3, 2, 8, dtype=torch.float64, requires_grad=True)
        segments = Segments.from_lengths(lengths)
        out, expected = compiled(qkv, segments), function(qkv, segments)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        gradients = [torch.autograd.grad(each.square().sum(), qkv)[0] for each in (out, expected)]
        torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)
    assert frames.frame_count == 1


@pytest.mark.parametrize("heads", [4, 2], ids=["", "grouped"])
@pytest.mark.parametrize("is_there", [False, True])
def test_one_graph_where_flash_attention_could_run(monkeypatch, is_there, heads):
    """What this PyTorch and GPU have is asked, and not traced; varlen_attn is in the graph."""
    tensors, segments, _ = problem(heads=heads)
    monkeypatch.setattr(op, "_is_flash_ready", lambda *_: True)
    if is_there:
        is_there = heads == 4 or "enable_gqa" in inspect.signature(varlen_attn).parameters
        monkeypatch.setattr(packed, "has_varlen", lambda *_: is_there)
    targets = []

    def backend(module, example):
        targets.extend(str(node.target) for node in module.graph.nodes)
        return (lambda *_: tensors[:1]) if is_there else module.forward

    torch._dynamo.reset()
    compiled = torch.compile(attention, backend=backend, fullgraph=True, dynamic=True)
    out = compiled(*tensors, segments)
    assert any("varlen_attn" in target for target in targets) == is_there
    if not is_there:
        torch.testing.assert_close(out, attention(*tensors, segments))


def test_meta_tensors():
    (q, k, v), segments, k_segments = problem(K_LENGTHS, device="meta")
    for of in ((segments, k_segments), map(unread, (segments, k_segments))):
        assert attention(q, k, v, *of).shape == q.shape
