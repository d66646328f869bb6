"""The tiles of attention's tangent: those of each GPU, what they walk over, and their first one."""

import functools

import pytest
import torch
from parity import BACKEND, DEVICE, DTYPES
from tangents import check, dual, eager, inputs

from tim_kernels import Segments, attention
from tim_kernels.dispatch.backend import use_backend
from tim_kernels.launch import tuning


@pytest.fixture(autouse=True)
def ours():
    with use_backend(BACKEND):
        yield


@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("architecture", [90, 100])
def test_tiles_of_larger_gpus(architecture, head_dim):
    with tuning.as_architecture(architecture):
        check(attention, eager, inputs(20, 100, head_dim, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("architecture", [90, 100])
def test_values_that_share_a_constant(architecture, dtype):
    """Sums by the tensor cores, and without them, are of p and w as they were rounded."""
    q, k, v, *tangents = inputs(33, 100, head_dim=72, dtype=dtype)
    with tuning.as_architecture(architecture):
        check(attention, eager, [q, k, v + 30, *tangents])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_share_a_constant_behind_a_mask(dtype):
    """A query's first key may be in any tile: it is there that the mean of ds is taken."""
    q, k, v, tq, tk, tv = inputs(70, 130, head_dim=72, heads=2, B=2, dtype=dtype)
    given = [q, k, v, tq, tk + 30, tv]
    first = torch.tensor([70, 5], device=DEVICE)
    mask = torch.arange(130, device=DEVICE) >= first[:, None]

    def plain(q, k, v):
        return torch.cat([eager(*(x[b, None, n:] if x is not q else x[b, None] for x in (q, k, v)))
                          for b, n in enumerate(first)])  # fmt: skip

    check(functools.partial(attention, key_mask=mask), plain, given)


@pytest.mark.skipif(DEVICE != "cpu", reason="nobody can count what a GPU's programs do")
def test_tiles_past_a_short_sample_walk_no_keys(monkeypatch):
    """Each sample's own tiles of queries times its tiles of keys, whatever the longest is."""
    from tim_kernels.attention import triton as kernels

    lengths, k_lengths = [1, 70, 0, 300], [40, 100, 7, 33]
    tile, calls = kernels._tile(torch.empty(0), 16), []
    scores = kernels._scores
    monkeypatch.setattr(kernels, "_scores", lambda *args: calls.append(1) or scores(*args))
    given = inputs(sum(lengths), sum(k_lengths), heads=2)
    segments = [Segments.from_lengths(each) for each in (lengths, k_lengths)]
    dual(lambda q, k, v: attention(q[0], k[0], v[0], *segments), given)
    walked = sum(
        -(-n // tile["rows"]) * -(-m // tile["columns"])
        for n, m in zip(lengths, k_lengths, strict=True)
    )
    assert len(calls) == 2 * walked  # of two heads
