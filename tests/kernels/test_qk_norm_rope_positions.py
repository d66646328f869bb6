"""Where tokens sit and lie: every source of positions, packed tokens, views of a packed qkv."""

import pytest
import torch
from parity import BACKEND, DEVICE, as_tuple, assert_parity, noise
from qk_norm_rope_forms import FORMS, both, eager_packed_qkv, packed_qkv, problem

from tim_kernels import Segments
from tim_kernels.dispatch.backend import use_backend
from tim_kernels.qk_norm_rope import reference
from tim_kernels.qk_norm_rope.op import qk_norm_rope


@pytest.mark.parametrize("order", reference.ORDERS)
@pytest.mark.parametrize("h, w", [(3, 5), (5, 3), (1, 4)])
def test_positions_from_every_source_agree(order, h, w):
    q, k, *rows = problem("both", grid=(h, w)).inputs
    grid = reference.grid_positions(h, w, order, DEVICE)
    sizes = torch.tensor([[h, w]] * 2, dtype=torch.int32, device=DEVICE)
    sources = (
        dict(grid=(h, w), order=order),
        dict(sizes=sizes, order=order),
        dict(positions=grid),
        dict(positions=grid.int()),
        dict(positions=grid.expand(2, -1, -1)),
    )
    for backend in ("reference", "triton"):
        with use_backend(backend):
            first, *others = [both(q, k, *rows, **source) for source in sources]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_every_sample_with_its_own_positions():
    q, k, *rows = problem("both", grid=(1, 3)).inputs
    at = torch.tensor([[[0, 1], [7, 2], [3, 3]], [[9, 9], [-4, 0], [1, 2]]], device=DEVICE)
    with use_backend(BACKEND):
        together = both(q, k, *rows, positions=at)
        for b in range(2):
            shifts = [row[b : b + 1] for row in rows[4:]]
            one = both(q[b : b + 1], k[b : b + 1], *rows[:4], *shifts, positions=at[b])
            assert all(torch.equal(x[b], y[0]) for x, y in zip(together, one, strict=True))


@pytest.mark.parametrize("top", [1023, 4096, 100_003, 2**24 - 1])
def test_far_positions(top):
    at = torch.tensor([[top, 0], [1, top], [top - 1, top - 2], [top // 3, top // 7]], device=DEVICE)
    assert_parity(*problem("both_unnormed", grid=(2, 2), D=72, positions=at))
    with use_backend(BACKEND):
        cos, sin = qk_norm_rope(torch.tensor([1.0, 0.0]).repeat(36).expand(1, 4, 1, 72).to(DEVICE),
                                positions=at).unflatten(-1, (36, 2)).unbind(-1)  # fmt: skip
    angles = at.float()[..., None] * reference.frequencies(72, DEVICE)
    angles = angles.flatten(-2).double()[None, :, None]
    assert (cos - angles.cos()).abs().max() < 1.2e-7 and (sin - angles.sin()).abs().max() < 1.2e-7


def test_packed_qkv_is_read_in_place():
    H, D = 2, 72
    qkv = noise(2, 6, 3, H, D, device=DEVICE)
    rows = problem("both", D=D).inputs[2:]
    wide = noise(2, 4 * H * D, seed=9, device=DEVICE)
    rows[4:] = wide[:, : H * D], wide[:, H * D : 2 * H * D]
    q, k, _ = qkv.unbind(2)
    with use_backend(BACKEND):
        views = both(q, k, *rows, grid=(2, 3))
        dense = both(*(x.contiguous() for x in (q, k, *rows)), grid=(2, 3))
        heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
        swapped = both(*heads_first, *rows, grid=(2, 3))
        gaps = both(q.mT.contiguous().mT, k, *rows, grid=(2, 3))
    for a, *others in zip(views, dense, swapped, gaps, strict=True):
        assert a.is_contiguous() and all(torch.equal(a, b) for b in others)


LENGTHS = [3, 0, 1, 6, 0]


def packed_positions(sizes, order):
    parts = [reference.grid_positions(h, w, order, DEVICE) for h, w in sizes]
    return torch.cat(parts)


@pytest.mark.parametrize("source", ["sizes", "positions", "grid", "none"])
@pytest.mark.parametrize("form", ["both", "alone"])
def test_packed_segments(form, source):
    """Lengths 0 and 1 among others; each segment as if it were alone."""
    cu = torch.tensor([0, 3, 3, 4, 10, 10], dtype=torch.int32, device=DEVICE)
    segments = Segments(cu, max_length=8)
    sizes, order = [(1, 3), (0, 0), (1, 1), (3, 2), (0, 5)], "grid"
    if source == "grid":
        sizes, order = [(2, 9)] * 5, "upstream"
        n = [torch.arange(length, device=DEVICE) for length in LENGTHS]
        at = torch.cat([torch.stack((i % 2, i // 2), -1) for i in n])
    else:
        at = packed_positions(sizes, order)
    positions = dict(
        sizes=dict(sizes=torch.tensor(sizes, dtype=torch.int32, device=DEVICE), order=order),
        positions=dict(positions=at),
        grid=dict(grid=(2, 9), order=order),
        none={},
    )[source]
    fused, eager, tokens, n_affine, *_ = FORMS[form]
    args = problem(form, B=5).inputs
    args[:tokens] = [noise(10, 2, 24, seed=i, device=DEVICE) for i in range(tokens)]

    def packed(*args):
        return fused(*args, segments=segments, **positions)

    def apart(*args):
        xs, rows = [x[:, None] for x in args[:tokens]], list(args[tokens:])
        index = torch.tensor(LENGTHS, device=DEVICE)
        rows[n_affine:] = [r.repeat_interleave(index, dim=0) for r in rows[n_affine:]]
        where = {} if source == "none" else dict(positions=at[:, None])
        return tuple(out[:, 0] for out in as_tuple(eager(*xs, *rows, **where)))

    assert_parity(packed, apart, args)


def test_packed_qkv_returns_a_view_and_fills_one_gradient():
    qkv, *rows = problem("packed_qkv", D=8).inputs
    for used in ((0,), (1, 2), (2,), (0, 1, 2)):
        gradients = []
        for function, backend in ((packed_qkv, "triton"), (eager_packed_qkv, "reference")):
            leaf = qkv.clone().requires_grad_()
            with use_backend(backend):
                outputs = function(leaf, *rows, grid=(2, 3))
                sum(outputs[i].square().sum() for i in used).backward()
            assert outputs[2].data_ptr() == leaf[:, :, 4:].data_ptr()
            gradients.append(leaf.grad)
        assert gradients[0].is_contiguous()
        assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)
