"""Gradients of the primal output by its log-sum-exp, without running attention again.

On a CPU by PyTorch's own kernel; what the kernels of a GPU are asked for is bound by their schemas,
and computed from those arguments by the definition, in float64.
"""

import functools
import itertools
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from parity import BACKEND, DERIVATIVE, DEVICE, DTYPES, assert_as_accurate, noise
from tangents import dual, inputs
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.static.launches import record_launches
from tim_kernels import Segments, attention
from tim_kernels.attention import backward, choice, op
from tim_kernels.dispatch.backend import use_backend
from tim_kernels.names import ATTENTIONS

CU, K_CU = [0, 0, 70, 71, 80], [0, 3, 40, 41, 120]  # the first has keys and no query


@pytest.fixture(autouse=True)
def ours():
    with use_backend(BACKEND):
        yield


def scores(q, k, scale, is_causal):
    """scale·q·kᵀ (B, heads, N, M) in float64, heads of k repeated."""
    k = k.repeat_interleave(q.shape[-2] // k.shape[-2], -2)
    s = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * (scale or q.shape[-1] ** -0.5)
    if is_causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return s


def by_definition(dout, q, k, v, out, lse, scale, is_causal):
    """dq, dk, dv from the log-sum-exp (B, heads, N): equation 4 of arXiv 2205.14135, appendix B."""
    scale, group = scale or q.shape[-1] ** -0.5, q.shape[-2] // k.shape[-2]
    p = (scores(q, k, scale, is_causal) - lse.double()[..., None]).exp()
    kk, vv = (x.double().repeat_interleave(group, -2) for x in (k, v))
    dout, out = dout.double(), out.double()
    dp = torch.einsum("bnhd,bmhd->bhnm", dout, vv)
    ds = p * (dp - (dout * out).sum(-1).transpose(1, 2)[..., None]) * scale
    dq = torch.einsum("bhnm,bmhd->bnhd", ds, kk)
    dk = torch.einsum("bhnm,bnhd->bmhd", ds, q.double())
    dv = torch.einsum("bhnm,bnhd->bmhd", p, dout)
    shared = [x.unflatten(2, (-1, group)).sum(3) for x in (dk, dv)]
    return tuple(x.to(q.dtype) for x in (dq, *shared))


def segments_of(*offsets):
    return [
        Segments(torch.tensor(c, dtype=torch.int32, device=DEVICE),
                 max(b - a for a, b in itertools.pairwise(c)))
        for c in offsets
    ]  # fmt: skip


def gradients(function, given):
    """Of the primal output, along one cotangent."""
    leaves = [x.detach().requires_grad_() for x in given[:3]]
    out = dual(function, [*leaves, *given[3:]])[0]
    return torch.autograd.grad(out, leaves, noise(*out.shape, seed=9, dtype=out.dtype).to(DEVICE))


def check(function, given):
    """Hold them to float64's, with the error of attention that is run again as the yardstick."""

    def plain(*leaves):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = function(*leaves)
        dout = noise(*out.shape, seed=9, dtype=given[0].dtype).to(out)
        return torch.autograd.grad(out, leaves, dout)

    truth, yardstick = plain(*(x.double() for x in given[:3])), plain(*given[:3])
    with patch.object(op, "_plain_attention", side_effect=AssertionError("it ran again")):
        found = gradients(function, given)
    for name, *each in zip("qkv", found, yardstick, truth, strict=True):
        assert_as_accurate(*each, DERIVATIVE, f"gradient of {name}")


@pytest.mark.parametrize("options", [{}, dict(scale=0.3, is_causal=True)], ids=["", "options"])
@pytest.mark.parametrize("N, M", [(70, 70), (33, 70), (70, 33)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded(dtype, N, M, options):
    given = inputs(N, M, head_dim=72, heads=2, B=2, dtype=dtype)
    check(functools.partial(attention, **options), given)


def test_reruns_are_equal():
    given = inputs(70, head_dim=72, heads=2, dtype=torch.bfloat16)
    assert all(map(torch.equal, gradients(attention, given), gradients(attention, given)))


def test_the_log_sum_exp():
    """(B, heads, N), packed (heads, T); ∞ of a query without keys."""

    def lse(given, key_mask=None, cu=None, k_cu=None, length=0, k_length=0, **options):
        return op.jvp_op(*given, key_mask, cu, k_cu, length, k_length,
                         *options.values(), True)[2]  # fmt: skip

    given = inputs(70, 33, head_dim=72, heads=4, B=2, k_heads=2)
    ours = lse(given, scale=0.3, is_causal=True)
    torch.testing.assert_close(ours, scores(*given[:2], 0.3, True).logsumexp(-1).float())
    mask = torch.tensor([[True] * 33, [False] * 33], device=DEVICE)
    ours = lse(given, mask, scale=None, is_causal=False)
    torch.testing.assert_close(ours[0], scores(*given[:2], None, False).logsumexp(-1)[0].float())
    assert bool(ours[1].isposinf().all())
    given = inputs(80, 120, head_dim=8, heads=2)
    cu, k_cu = (s.cu_seqlens for s in segments_of(CU, K_CU))
    ours = lse([x[0] for x in given], None, cu, k_cu, 79, 79, scale=None, is_causal=False)
    s = scores(*given[:2], None, False)[0]
    spans = zip(itertools.pairwise(CU), itertools.pairwise(K_CU), strict=True)
    each = [s[:, slice(*of), slice(*keys)].logsumexp(-1) for of, keys in spans]
    torch.testing.assert_close(ours, torch.cat(each, -1).float())


def test_nobody_pays_for_a_gradient_that_nobody_asks_for():
    given = inputs(9, head_dim=8)
    leaves = [x.clone().requires_grad_() for x in given[:3]]

    def has_lse(given, **options):
        with record_launches() as launches:
            dual(functools.partial(attention, **options), given)
        return launches[0].arguments["lse_ptr"] is not None

    assert has_lse([*leaves, *given[3:]])
    assert not has_lse(given)
    mask = torch.ones(1, 9, dtype=torch.bool, device=DEVICE)
    assert not has_lse([*leaves, *given[3:]], key_mask=mask)  # nothing would take it
    with torch.no_grad():
        assert not has_lse([*leaves, *given[3:]])


def test_opcheck():
    given = inputs(5, 3, head_dim=24, heads=2)
    rest = None, None, None, 0, 0, None, False, True
    torch.library.opcheck(op.jvp_op.torch_op, (*given, *rest))
    cu, k_cu = (torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (5, 3))
    rest = None, cu, k_cu, 5, 3, None, False, True
    torch.library.opcheck(op.jvp_op.torch_op, (*(x[0] for x in given), *rest))


class Stand(TorchDispatchMode):
    """In an operator's place: takes what its schema does, and `compute`s of it."""

    def __init__(self, name, compute):
        super().__init__()
        self.operator, self.compute, self.calls = getattr(torch.ops.aten, name), compute, 0

    def __call__(self, *args, **options):
        self.calls += 1
        with self:
            return self.operator(*args, **options)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is self.operator.default
        arguments = function._schema.arguments
        given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        return self.compute({a.name: a.default_value for a in arguments} | given)


def of_flash(given):
    """As flash attention's backward reads its arguments."""
    assert given["dropout_p"] == 0 and given["rng_state"].dtype == torch.uint64
    tensors = [given[n] for n in ("grad_out", "query", "key", "value", "out")]
    lse, options = given["logsumexp"], (given["scale"], given["is_causal"])
    if given["cum_seq_q"] is None:
        q, k = tensors[1:3]
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        assert (given["max_q"], given["max_k"]) == (q.shape[1], k.shape[1])
        return by_definition(*tensors, lse, *options)
    assert lse.shape == tuple(tensors[1].shape[1::-1])
    cu, k_cu = (given[n].tolist() for n in ("cum_seq_q", "cum_seq_k"))
    for ends, longest in ((cu, given["max_q"]), (k_cu, given["max_k"])):
        assert longest == max(b - a for a, b in itertools.pairwise(ends))
    parts = []
    for (a, b), (c, d) in zip(itertools.pairwise(cu), itertools.pairwise(k_cu), strict=True):
        each = [x[None, a:b] if i in (0, 1, 4) else x[None, c:d] for i, x in enumerate(tensors)]
        parts.append([x[0] for x in by_definition(*each, lse[None, :, a:b], *options)])
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def of_efficient(given):
    """As efficient attention's backward does: its log-sum-exp has whole steps of 32 rows."""
    assert given["dropout_p"] == 0 and given["bias"] is None and given["cu_seqlens_q"] is None
    tensors = [given[n] for n in ("grad_out_", "query", "key", "value", "out")]
    lse, N = given["logsumexp"], tensors[1].shape[1]
    assert lse.shape[-1] == -(-N // 32) * 32 and bool(lse[..., N:].isposinf().all())
    is_causal = bool(given["custom_mask_type"])
    found = by_definition(*tensors, lse[..., :N], given["scale"], is_causal)
    return *found, torch.empty(0)


def as_on_a_gpu(monkeypatch, way, name, compute):
    stand = Stand(name, compute)
    monkeypatch.setattr(backward, "way", lambda *_: way)
    monkeypatch.setattr(backward, "aten", SimpleNamespace(**{name: stand}))
    return stand


OPTIONS = [{}, dict(scale=0.3, is_causal=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=["", "options"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_what_flash_attention_is_asked_for(monkeypatch, dtype, options):
    stand = as_on_a_gpu(monkeypatch, "flash", "_flash_attention_backward", of_flash)
    given = inputs(40, head_dim=72, heads=4, k_heads=2, B=2, dtype=dtype)

    check(functools.partial(attention, **options), given)
    assert stand.calls == 1


@pytest.mark.parametrize("k_offsets", [None, K_CU], ids=["self", "cross"])
@pytest.mark.parametrize("options", OPTIONS, ids=["", "options"])
def test_what_flash_attention_is_asked_for_of_packed_tokens(monkeypatch, k_offsets, options):
    stand = as_on_a_gpu(monkeypatch, "flash", "_flash_attention_backward", of_flash)
    segments = segments_of(CU, *([k_offsets] if k_offsets else []))
    given = inputs(80, k_offsets and 120, head_dim=8, heads=2, dtype=torch.bfloat16)
    given = [x[0] for x in given]
    check(lambda q, k, v: attention(q, k, v, *segments, **options), given)
    assert stand.calls == 1


@pytest.mark.parametrize("options", OPTIONS, ids=["", "options"])
def test_what_efficient_attention_is_asked_for(monkeypatch, options):
    stand = as_on_a_gpu(monkeypatch, "efficient", "_efficient_attention_backward", of_efficient)
    check(functools.partial(attention, **options), inputs(40, 70, head_dim=72, heads=2, B=2))
    assert stand.calls == 1


def test_which_way():
    """By what PyTorch says of its kernels; nothing for what none of them takes."""

    def way(dtype=torch.bfloat16, is_packed=False, is_flash=True, device="cuda", **sizes):
        q, k, v = (x.to("meta") for x in inputs(9, head_dim=8, heads=2, dtype=dtype, **sizes)[:3])
        q, k, v = (x[0] if is_packed else x for x in (q, k, v))
        fake = patch.object(backward, "_device", lambda x: device)
        with fake, patch.object(torch.version, "hip", None):
            return backward.way(q, k, v, is_packed, False, is_flash)

    flash, efficient = (patch.object(backward.cuda, f"can_use_{name}_attention", lambda _: True)
                        for name in ("flash", "efficient"))  # fmt: skip
    with efficient:
        assert way() is None and way(torch.float32) == "efficient"
        assert way(torch.float32, is_packed=True) is None
        assert way(torch.float32, k_heads=1) is None
        with flash:
            assert way() == way(is_packed=True) == way(k_heads=1) == "flash"
            assert way(is_flash=False) is None  # causal, of other lengths
        assert way(device="xpu") is None
    assert way(torch.float32) is None  # as where it is switched off
    assert way(device="cpu") == "cpu" and way(device="cpu", is_packed=True) is None
    assert way(device="cpu", k_heads=1) is None
    assert way(device="cpu", M=0) is None


def test_a_kernel_with_a_faster_backward_runs_again(monkeypatch):
    q = torch.empty(1, dtype=torch.bfloat16)
    gpu = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"))
    found = {}
    for name in ATTENTIONS[1:]:
        monkeypatch.setattr(choice, "chosen", lambda name=name: name)
        found[name] = op._is_pytorch_s_flash([gpu])
        assert op._is_pytorch_s_flash([q])  # a CPU has no choice
    assert {name for name in found if found[name]} == {"native", "flash", "flash_attn"}
