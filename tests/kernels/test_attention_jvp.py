"""The tangent of attention, from our kernel, against float64; its primal and what it refuses.

The yardstick is the published eager code, which materialises the scores under forward mode.
"""

import functools
import itertools
from unittest.mock import patch

import pytest
import torch
from parity import (
    BACKEND,
    DEVICE,
    DTYPES,
    assert_adjoint,
    noise,
    run,
)
from tangents import check, dual, eager, inputs
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.static.launches import launch_operator, record_launches
from tim_kernels import Segments, attention
from tim_kernels.attention import op
from tim_kernels.dispatch.backend import use_backend
from tim_kernels.launch import tuning


@pytest.fixture(autouse=True)
def ours():
    with use_backend(BACKEND):
        yield


def options_in_eager(q, k, v, scale=None, is_causal=False):
    """`eager` with a mask and with heads repeated; the scale is moved into q."""
    heads, D = q.shape[-2:]
    k, v = (x.repeat_interleave(heads // x.shape[-2], -2) for x in (k, v))
    q = q if scale is None else q * (scale * D**0.5)
    if not is_causal:
        return eager(q, k, v)
    rows = [eager(q[:, i, None], k[:, : i + 1], v[:, : i + 1]) for i in range(q.shape[1])]
    return torch.cat(rows, 1)


@pytest.mark.parametrize("N", [1, 7, 64, 100, 257])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128])
def test_float32(head_dim, N):
    check(attention, eager, inputs(N, head_dim=head_dim))


@pytest.mark.parametrize("N, M", [(100, 100), (7, 130), (130, 1)])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_and_cross_lengths(dtype, head_dim, N, M):
    check(attention, eager, inputs(N, M, head_dim, heads=2, B=2, dtype=dtype))


@pytest.mark.parametrize(
    "live", [c for c in itertools.product((0, 1), repeat=3) if any(c)], ids=str
)
def test_tangents_that_are_absent(live):
    given = inputs(70, 33, head_dim=72, dtype=torch.bfloat16)
    check(attention, eager, given[:3] + [t if is_live else None for t, is_live in
                                         zip(given[3:], live, strict=True)])  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 72, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_a_gpu(dtype, head_dim):
    """Elsewhere than on one the interpreter's own tiles are tested, which are larger."""
    with tuning.as_architecture(80):
        check(attention, eager, inputs(50, 40, head_dim, dtype=dtype))


OPTIONS = {
    "scale": (dict(scale=0.3), {}),
    "causal": (dict(is_causal=True), {}),
    "grouped": ({}, dict(heads=4, k_heads=2)),
    "all": (dict(scale=0.3, is_causal=True), dict(heads=3, k_heads=1)),
}


@pytest.mark.parametrize("N, M", [(40, 40), (70, 33), (33, 70)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype, N, M):
    options, heads = OPTIONS[name]
    given = inputs(N, M, head_dim=72, dtype=dtype, B=2, **heads)

    def plain(q, k, v):
        return options_in_eager(q, k, v, **options)

    check(functools.partial(attention, **options), plain, given)
    if dtype == torch.float32:
        with tuning.as_architecture(80):  # smaller tiles: some are all seen, some in part
            check(functools.partial(attention, **options), plain, given)


def test_packed_options():
    cu, k_cu = ([0, 0, 70, 71, 80], [0, 3, 40, 41, 120])
    segments, k_segments = (
        Segments(torch.tensor(c, dtype=torch.int32, device=DEVICE), 79) for c in (cu, k_cu)
    )
    given = inputs(80, 120, head_dim=8, heads=4, k_heads=2)
    options = dict(scale=0.3, is_causal=True)

    def plain(q, k, v):
        spans = zip(itertools.pairwise(cu[1:]), itertools.pairwise(k_cu[1:]), strict=True)
        each = [(q[:, a:b], k[:, c:d], v[:, c:d]) for (a, b), (c, d) in spans]
        return torch.cat([options_in_eager(*x, **options) for x in each], 1)

    def packed(q, k, v):
        return attention(q[0], k[0], v[0], segments, k_segments, **options)[None]

    check(packed, plain, given)


@pytest.mark.parametrize("is_packed", [False, True], ids=["", "packed"])
def test_the_primal_s_gradient_with_options(is_packed):
    """Where queries see no key it is zero, as everything."""
    options = dict(scale=0.3, is_causal=True)
    given = inputs(9, 9, heads=4, k_heads=2)
    if is_packed:
        given = [x[0] for x in given]
        cu = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
        options |= dict(segments=Segments(cu, 5))
    else:
        options |= dict(key_mask=torch.arange(9, device=DEVICE)[None] >= 2)
    function = functools.partial(attention, **options)
    leaves = [x.requires_grad_() for x in given[:3]]
    expected = function(*leaves)
    out, tangent = dual(function, leaves + given[3:])
    torch.testing.assert_close(out, expected)
    assert is_packed or not (out[0, :2].any() or tangent[0, :2].any())
    gradients = [torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected)]
    torch.testing.assert_close(*gradients)


def test_packed_qkv_is_read_in_place():
    packed, tangent = (noise(2, 9, 3, 2, 72, seed=i, device=DEVICE) for i in range(2))
    views = [*packed.unbind(2), *tangent.unbind(2)]
    strided, dense = dual(attention, views), dual(attention, [x.contiguous() for x in views])
    assert all(map(torch.equal, strided, dense))
    with record_launches() as launches:
        dual(attention, views)
    (launch,) = launches
    for name, view in zip(("q", "k", "v", "tq", "tk", "tv"), views, strict=True):
        assert launch.arguments[f"{name}_ptr"].data_ptr() == view.data_ptr()


@pytest.mark.parametrize("is_cross", [False, True], ids=["self", "cross"])
def test_packed_segments(is_cross):
    """Of lengths 0 and 1 too, and queries whose sequence has no keys."""
    cu = [0, 0, 70, 71, 74, 80]
    k_cu = [0, 3, 3, 40, 41, 120] if is_cross else cu

    def pack(c):
        longest = max(b - a for a, b in itertools.pairwise(c))
        return Segments(torch.tensor(c, dtype=torch.int32, device=DEVICE), longest)

    segments, k_segments = pack(cu), pack(k_cu) if is_cross else None
    given = inputs(80, k_cu[-1], head_dim=72, heads=2, dtype=torch.bfloat16)

    def plain(q, k, v):
        spans = zip(itertools.pairwise(cu), itertools.pairwise(k_cu), strict=True)
        return torch.cat([eager(q[:, a:b], k[:, c:d], v[:, c:d]) for (a, b), (c, d) in spans], 1)

    def packed(q, k, v):
        return attention(q[0], k[0], v[0], segments, k_segments)[None]

    check(packed, plain, given)


def test_key_mask():
    """As the keys that remain; a sample without any gives zeros, also in its gradients."""
    given = inputs(40, 100, head_dim=72, heads=2, B=3)
    mask = noise(3, 100, seed=9, device=DEVICE) > 0
    mask[1, :70], mask[2] = False, False  # a whole tile of keys, every key

    def plain(q, k, v):
        rows = [eager(q[b, None], k[b, None, mask[b]], v[b, None, mask[b]]) for b in range(3)]
        return torch.cat(rows)

    def masked(q, k, v):
        return attention(q, k, v, key_mask=mask)

    check(masked, plain, given)
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    plain_out = masked(*leaves)
    out, tangent = dual(masked, leaves + given[3:])
    torch.testing.assert_close(out, plain_out)
    assert not out[2].any() and not tangent[2].any()
    expected = torch.autograd.grad(plain_out.sum(), leaves)
    for gradient, other in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        assert torch.equal(gradient, other)
        assert bool(gradient.isfinite().all()) and not gradient[2].any()


ADVERSARIES = {
    "one key dominates": lambda q, k, v, *t: (q, _with(k, 5, 50 * q.mean(1)), v, *t),
    "the last key dominates": lambda q, k, v, *t: (q, _with(k, -1, 50 * q.mean(1)), v, *t),
    "all keys are equal": lambda q, k, v, *t: (q, k[:, :1] + 0 * k, v, *t),
    "large scores": lambda q, k, v, *t: (8 * q, 8 * k, v, *t),
    "values share a constant": lambda q, k, v, *t: (q, k, v + 30, *t),
    "keys share a constant": lambda q, k, v, *t: (q, k + 3, v, *t),
    "scores' tangents share a constant": lambda q, k, v, tq, tk, tv: (q, k, v, tq, tk + 30, tv),
}  # fmt: skip


def _with(x, token, value):
    x = x.clone()
    x[:, token] = value
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversaries(name, dtype):
    more = dict(B=4, heads=4) if DEVICE == "cuda" else {}  # the yardstick depends on few rows
    given = ADVERSARIES[name](*inputs(70, 100, head_dim=72, dtype=dtype, **more))
    check(attention, eager, given)


def test_keys_that_fade_leave_no_trace():
    """Scores that grow from tile to tile by more than the exponents of float32 can hold."""
    q, k, v, *tangents = inputs(16, 260, head_dim=8, heads=4, B=2)  # few rows are luck
    k = k + torch.linspace(0, 100, 260, device=DEVICE).view(1, -1, 1, 1)
    check(attention, eager, [q.abs() + 1, k, v, *tangents])


@pytest.mark.parametrize("N, M", [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_attend(N, M):
    out, tangent = dual(attention, inputs(N, M, head_dim=8, B=2))
    assert out.shape == tangent.shape == (2, N, 1, 8)
    assert not out.any() and not tangent.any()


def test_adjoint_of_pytorch_s_backward():
    primals = inputs(70, 33, head_dim=72, heads=2)[:3]
    assert_adjoint(run(attention, primals), primals)


def test_central_difference():
    given = inputs(20, 33, head_dim=72)
    double = [x.double() for x in given]

    def at(step):
        return eager(*(x + step * t for x, t in zip(double[:3], double[3:], strict=True)))

    difference = (at(1e-5) - at(-1e-5)) / 2e-5
    _, tangent = dual(attention, given)
    assert (tangent.double() - difference).norm() <= 2e-6 * difference.norm()


def test_the_primal_has_the_gradient_of_plain_attention():
    """Through torch.func.jvp and forward_ad alike, and the tangent, a constant, has none."""
    x, t = inputs(9, head_dim=8)[:2]
    weight = noise(3, 8, 8, seed=5, device=DEVICE).requires_grad_()

    def network(x):
        return attention(x @ weight[0], x @ weight[1], x @ weight[2])

    (expected,) = torch.autograd.grad(network(x).square().sum(), weight)
    out, tangent = torch.func.jvp(network, (x,), (t,))
    (gradient,) = torch.autograd.grad(out.square().sum(), weight, retain_graph=True)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    with forward_ad.dual_level():
        again = forward_ad.unpack_dual(network(forward_ad.make_dual(x, t)))
        assert torch.equal(again.tangent, tangent)
        assert torch.equal(torch.autograd.grad(again.primal.square().sum(), weight)[0], gradient)
    with pytest.raises(NotImplementedError, match="no derivative"):
        tangent.sum().backward()


def test_what_it_refuses():
    given = inputs(9, head_dim=8)

    def first(*primals):
        return dual(attention, [*primals, *given[3:]])[1]

    with pytest.raises(NotImplementedError, match="no forward derivative"):
        dual(first, given)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="(?i)forward derivative|forward mode|exception"):
        torch.compile(first, backend="aot_eager", fullgraph=True)(*given[:3])
    refusals = NotImplementedError, torch._dynamo.exc.Unsupported  # before torch 2.14, and since
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with pytest.raises(refusals, match="forward AD|dual tensor"), forward_ad.dual_level():
        compiled(*(forward_ad.make_dual(x, t) for x, t in zip(given[:3], given[3:], strict=True)))


@pytest.mark.parametrize(
    "change",
    [dict(head_dim=12), dict(head_dim=264), dict(dtype=torch.double), dict(v_head_dim=16)],
)
def test_others_go_to_the_composite(change):
    v_head_dim = change.pop("v_head_dim", None)
    given = inputs(5, 3, **change)
    if v_head_dim:
        given[2], given[5] = (torch.cat([x, x.sin()], -1) for x in (given[2], given[5]))
    with patch.object(op, "jvp_op", side_effect=AssertionError("no kernel for these")):
        result = dual(attention, given)
    for ours, truth in zip(result, dual(eager, [x.double() for x in given]), strict=True):
        torch.testing.assert_close(ours.double(), truth, atol=1e-5, rtol=1e-5)


def test_a_map_of_tangents():
    given = inputs(9, head_dim=8)
    along = torch.stack((given[3], given[4]))
    ours = torch.vmap(lambda t: dual(attention, [*given[:3], t, None, None])[1])(along)
    expected = [dual(attention, [*given[:3], t, None, None])[1] for t in along]
    assert torch.equal(ours, torch.stack(expected))


def test_reruns_are_equal():
    given = inputs(100, 130, head_dim=72, heads=2, dtype=torch.bfloat16)
    assert all(map(torch.equal, dual(attention, given), dual(attention, given)))


def test_opcheck():
    given = inputs(5, 3, head_dim=24, heads=2)
    mask = torch.ones(1, 3, dtype=torch.bool, device=DEVICE)
    torch.library.opcheck(op.jvp_op.torch_op, (*given, mask, None, None, 0, 0))
    cu, k_cu = (torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (5, 3))
    torch.library.opcheck(op.jvp_op.torch_op, (*(x[0] for x in given), None, cu, k_cu, 5, 3))
    given = inputs(5, 3, head_dim=24, heads=4, k_heads=2)
    torch.library.opcheck(op.jvp_op.torch_op, (*given, None, None, None, 0, 0, 0.3, True))


class _Largest(TorchDispatchMode):
    """The largest tensor that anything makes, through our launchers."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tim_kernels":
            with self:
                out = launch_operator(function, *args)
        else:
            out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def test_memory_grows_with_the_tokens_alone():
    q, k, v, *t = (torch.empty(2, 4096, 4, 64, device="meta") for _ in range(6))
    with record_launches() as launches, _Largest() as mode:
        dual(attention, [q, k, v, *t])
    assert len(launches) == 1 and mode.elements == q.numel()
    with _Largest() as mode, use_backend("reference"):
        dual(attention, [q, k, v, *t])
    assert mode.elements == 2 * 4 * 4096 * 4096  # the yardstick sees what it should
