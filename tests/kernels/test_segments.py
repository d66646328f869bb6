"""Packed sequences: what is refused before a kernel reads memory that is not its own."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from parity import BACKEND, DEVICE, noise
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

import tim_kernels as ops
from tim_kernels import Segments, use_backend


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    "cu_seqlens, max_length, message",
    [
        ([0, 4, 10], 6, r"cu_seqlens must be an int32 tensor \(S \+ 1,\), got a list"),
        (torch.tensor([0, 4]), 4, r"int32 \(S \+ 1,\), got torch.int64 \(2,\)"),
        (torch.zeros(1, 2, dtype=torch.int32), 4, r"got torch.int32 \(1, 2\)"),
        (torch.zeros(0, dtype=torch.int32), 4, r"got torch.int32 \(0,\)"),
        (torch.zeros(4, dtype=torch.int32)[::2], 4, "contiguous, got stride 2"),
        (offsets(1, 4, 10), 9, "must start at 0, got 1"),
        (offsets(0, 7, 5, 10), 9, "must not fall, got 5 after 7"),
        (offsets(0, -1), 9, "must not fall, got -1 after 0"),
        (offsets(0, 4, 10), 5, "max_length must be 6, or more, got 5"),
        (offsets(0, 4), -1, "max_length must not be negative, got -1"),
        (offsets(0, 4), 4.0, "max_length must be an integer, got a float"),
        (offsets(0, 4), None, "max_length must be an integer, got a NoneType"),
    ],
)
def test_refusals(cu_seqlens, max_length, message):
    with pytest.raises(ValueError, match=message) as error:
        Segments(cu_seqlens, max_length)
    assert "\n" not in str(error.value)


def test_what_is_known_of_them():
    assert Segments(offsets(0, 4, 4, 10), 8).total == 10
    assert Segments(offsets(0, 4, 4, 10), 8).lengths == (4, 0, 6)
    assert Segments(offsets(0), 0).total == 0
    assert type(Segments(offsets(0, 4), np.int64(4)).max_length) is int
    segments = Segments.from_lengths([4, 0, np.int32(6)], DEVICE)
    assert (segments.max_length, segments.total) == (6, 10)
    assert torch.equal(segments.cu_seqlens, offsets(0, 4, 4, 10))
    assert segments.lengths == segments.to("meta").lengths == (4, 0, 6)
    assert segments.to("meta").cu_seqlens.is_meta and segments.to("meta").total == 10
    assert Segments.from_lengths([]).total == 0
    for lengths, message in (([3, -1], "not be negative, got -1"), ([2.5], "got a float"),
                             ([2**31 - 1, 1], "at most, got 2147483648")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Segments.from_lengths(lengths)
    with pytest.raises(AttributeError):
        segments.max_length = 1


ROWS = noise(2, 8, device=DEVICE)
SEGMENTS = Segments(offsets(0, 4, 10), 6)
QUERIES = Segments(offsets(0, 1, 3), 2)


def tangent(q):
    return torch.func.jvp(lambda q: ops.attention(q, q, q, SEGMENTS), (q,), (q.cos(),))[1]


CALLS = {  # of (T, 8), which should have ten tokens
    "ada_layer_norm": lambda x: ops.ada_layer_norm(x, ROWS, ROWS, segments=SEGMENTS),
    "gated_residual": lambda x: ops.gated_residual(x, x, ROWS, segments=SEGMENTS),
    "gated_residual_ada_layer_norm": lambda x: ops.gated_residual_ada_layer_norm(
        x, x, ROWS, ROWS, ROWS, segments=SEGMENTS
    )[1],
    "attention": lambda x: ops.attention(*x[:, None].expand(3, -1, 1, 8), SEGMENTS),
    "attention, keys": lambda x: ops.attention(
        ROWS[:1, None].expand(3, 1, 8), x[:, None], x[:, None], QUERIES, SEGMENTS
    ),
    "attention, tangent": lambda x: tangent(x[:, None]),
    "qk_norm_rope": lambda x: ops.qk_norm_rope(x.unflatten(1, (2, 4)), segments=SEGMENTS),
    "qkv_norm_rope": lambda x: ops.qkv_norm_rope(
        x[:, None].expand(-1, 3, 8).unflatten(2, (2, 4)), segments=SEGMENTS
    )[0],
}


@pytest.mark.parametrize("backend", ["reference", BACKEND])
@pytest.mark.parametrize("name", CALLS)
def test_tokens_that_are_not_theirs(name, backend):
    with use_backend(backend):
        assert CALLS[name](noise(10, 8, device=DEVICE)).isfinite().all()
        for tokens in (9, 11, 0):
            with pytest.raises(ValueError, match=rf"have the 10 tokens .* got \({tokens}, "):
                CALLS[name](noise(tokens, 8, device=DEVICE))


def test_only_segments_are_segments():
    """Neither offsets, nor those of another copy of this package, nor the tuple of other code."""
    for other in (offsets(0, 10), (offsets(0, 10), 10)):
        with pytest.raises(ValueError, match=r"segments must be a <class 'tim_kernels\.segments"):
            ops.ada_layer_norm(noise(10, 8, device=DEVICE), ROWS, ROWS, segments=other)
    elsewhere = Segments(offsets(0, 4, 10).to("meta"), 6)
    with pytest.raises(ValueError, match=f"cu_seqlens must be on {DEVICE}.* like x, got meta"):
        ops.ada_layer_norm(noise(10, 8, device=DEVICE), ROWS, ROWS, segments=elsewhere)


def test_what_cannot_be_read_is_vouched_for(monkeypatch):
    wrong = offsets(3, 1)
    assert Segments(wrong.to("meta"), 6).total is Segments(wrong.to("meta"), 6).lengths is None
    with FakeTensorMode() as mode:
        assert Segments(mode.from_tensor(wrong), 6).total is None
    made = torch.compile(lambda cu: Segments(cu, 6), backend="eager", fullgraph=True)(wrong)
    assert made.total is None and made.cu_seqlens is wrong
    seen = torch.func.vmap(lambda cu: cu + (Segments(cu, 6).total is None))(wrong[None])
    assert torch.equal(seen[0], wrong + 1)
    with pytest.raises(ValueError, match="total must be 10, the last of cu_seqlens, got 9"):
        Segments(torch.tensor([0, 4, 10], dtype=torch.int32), 6, 9)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert Segments(wrong, 6, 4).total == 4
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert Segments(wrong, 6).total is None


def test_copies_and_trees():
    """No copy is read again."""
    copies = [pickle.loads(pickle.dumps(SEGMENTS)), copy.deepcopy(SEGMENTS)]
    copies += [pytree.tree_map(lambda leaf: leaf, SEGMENTS)]
    for each in copies:
        assert type(each) is Segments and (each.max_length, each.total) == (6, 10)
        assert each.lengths == (4, 6)
        assert torch.equal(each.cu_seqlens, SEGMENTS.cu_seqlens)
    assert pytree.tree_map(lambda _: None, SEGMENTS).cu_seqlens is None
    x = noise(2, 10, 8, device=DEVICE)

    def norm(x, segments):
        return ops.ada_layer_norm(x, ROWS, ROWS, segments=segments)

    mapped = torch.func.vmap(norm, (0, None))(x, SEGMENTS)
    torch.testing.assert_close(mapped[1], norm(x[1], SEGMENTS))
    exported = torch.export.export(Norm(), (x[0], SEGMENTS)).module()
    torch.testing.assert_close(exported(x[1], SEGMENTS), norm(x[1], SEGMENTS))


class Norm(torch.nn.Module):
    def forward(self, x, segments):
        return ops.ada_layer_norm(x, ROWS, ROWS, segments=segments)


def test_compiled_for_all_lengths():
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(Norm(), backend=frames, fullgraph=True, dynamic=True)
    with use_backend(BACKEND):
        for lengths in ([4, 6], [3, 9], [7, 2]):
            x, segments = (
                noise(sum(lengths), 8, device=DEVICE),
                Segments.from_lengths(lengths, DEVICE),
            )
            assert torch.equal(compiled(x, segments), Norm()(x, segments))
        with pytest.raises(ValueError, match="have the 9 tokens"):
            Norm()(noise(8, 8, device=DEVICE), segments)
    assert frames.frame_count == 1
