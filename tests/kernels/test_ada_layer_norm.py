import pytest
import torch
import torch.nn.functional as F
from parity import (
    BACKEND,
    DEVICE,
    DTYPES,
    WIDTHS,
    assert_adjoint,
    assert_compiles_once,
    assert_gradcheck,
    assert_nonfinite_like_reference,
    assert_parity,
    assert_same_every_run,
    noise,
)
from sweep import st, sweep

from tim_kernels import (
    Segments,
    ada_layer_norm,
    gated_residual,
    gated_residual_ada_layer_norm,
)
from tim_kernels.ada_layer_norm import op
from tim_kernels.dispatch.backend import use_backend


def eager_norm(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def eager_residual(x, branch, gate, bias=None):
    return x + gate[:, None] * (branch if bias is None else branch + bias[:, None])


def eager_both(x, branch, gate, shift, scale, bias=None):
    x = eager_residual(x, branch, gate, bias)
    return x, eager_norm(x, shift, scale)


def both(x, branch, gate, shift, scale, bias=None):
    return gated_residual_ada_layer_norm(x, branch, gate, shift, scale, branch_bias=bias)


FORMS = {  # the op, its eager twin, how many token tensors and rows it takes
    "norm": (ada_layer_norm, eager_norm, 1, 2),
    "residual": (gated_residual, eager_residual, 2, 1),
    "residual_bias": (gated_residual, eager_residual, 2, 2),
    "both": (both, eager_both, 2, 3),
    "both_bias": (both, eager_both, 2, 4),
}


def inputs(form, B=2, N=5, C=96, dtype=torch.float32, row_dtype=None, rows=None):
    *_, tokens, n_rows = FORMS[form]
    xs = [noise(B, N, C, seed=i, dtype=dtype, device=DEVICE) for i in range(tokens)]
    row_dtype = row_dtype or dtype
    return xs + [
        noise(rows or B, C, seed=10 + i, dtype=row_dtype, device=DEVICE) for i in range(n_rows)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_parity(form, dtype):
    fused, eager, *_ = FORMS[form]
    for C in WIDTHS:
        assert_parity(fused, eager, inputs(form, C=C, dtype=dtype))


@pytest.mark.parametrize("B, N", [(1, 1), (1, 9), (3, 1), (3, 70)])
@pytest.mark.parametrize("form", FORMS)
def test_sizes(form, B, N):
    fused, eager, *_ = FORMS[form]
    assert_parity(fused, eager, inputs(form, B, N, C=72))


@pytest.mark.parametrize("B, N", [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_do(form, B, N):
    fused, *_ = FORMS[form]
    leaves = [x.requires_grad_() for x in inputs(form, B, N, C=8, rows=max(B, 1))]
    with use_backend(BACKEND):
        out = fused(*leaves)
        for o in out if isinstance(out, tuple) else (out,):
            assert o.shape == (B, N, 8)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    for leaf in leaves:
        assert leaf.grad is None or not leaf.grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_one_row_for_all_samples_and_mixed_dtypes(form):
    fused, eager, *_ = FORMS[form]
    args = inputs(form, B=3, dtype=torch.bfloat16, row_dtype=torch.float32, rows=1)
    assert_parity(fused, lambda *a: _to_first_dtype(eager(*a), a[0]), args)


def _to_first_dtype(out, x):
    return tuple(o.to(x.dtype) for o in out) if isinstance(out, tuple) else out.to(x.dtype)


def test_strided_input_is_read_in_place():
    packed = noise(2, 7, 3 * 96, device=DEVICE)
    x, branch = packed[..., :96], packed[..., 96:192]
    chunks = noise(2, 6 * 96, seed=1, device=DEVICE).chunk(6, dim=-1)
    with use_backend(BACKEND):
        strided = both(x, branch, *chunks[:3])
        dense = both(x.contiguous(), branch.contiguous(), *(c.contiguous() for c in chunks[:3]))
        transposed = both(x.mT.contiguous().mT, branch, *chunks[:3])
    for a, b, c in zip(strided, dense, transposed, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("form", FORMS)
def test_packed_segments(form):
    """Lengths 0 and 1 among others; each segment as if it were alone."""
    fused, *_ = FORMS[form]
    lengths = [3, 0, 1, 6, 0]
    cu = torch.tensor([0, 3, 3, 4, 10, 10], dtype=torch.int32, device=DEVICE)
    segments = Segments(cu, max_length=8)
    *_, tokens, n_rows = FORMS[form]
    xs = [noise(10, 72, seed=i, device=DEVICE) for i in range(tokens)]
    rows = [noise(5, 72, seed=10 + i, device=DEVICE) for i in range(n_rows)]

    def packed(*args):
        if form.startswith("residual"):
            return gated_residual(*args, segments=segments)
        if form == "norm":
            return ada_layer_norm(*args, segments=segments)
        x, branch, gate, shift, scale, *bias = args
        return gated_residual_ada_layer_norm(
            x, branch, gate, shift, scale, 1e-6, *(bias or [None]), segments=segments
        )

    def eager(*args):
        xs, rows = args[:tokens], args[tokens:]
        rows = [r.repeat_interleave(torch.tensor(lengths, device=DEVICE), dim=0) for r in rows]
        out = FORMS[form][1](*(x[:, None] for x in xs), *rows)
        return tuple(o[:, 0] for o in out) if isinstance(out, tuple) else out[:, 0]

    assert_parity(packed, eager, xs + rows)


@pytest.mark.parametrize("form", FORMS)
def test_reruns_are_equal_and_derivatives_adjoint(form):
    fused, *_ = FORMS[form]
    args = inputs(form, B=3, N=150)
    assert_same_every_run(fused, args)
    assert_adjoint(fused, args)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    assert_gradcheck(FORMS[form][0], inputs(form, B=1, N=2, C=6))


def test_mean_far_from_zero():
    x, shift, scale = inputs("norm", C=1152)
    assert_parity(ada_layer_norm, eager_norm, [x + 1e4, shift, scale])


@pytest.mark.parametrize("form", FORMS)
def test_nan_and_infinity(form):
    args = inputs(form, N=4)
    for row, value in ((0, float("nan")), (2, float("inf"))):
        args[0][0, row, 3] = value
    args[-1][1, 5] = float("-inf")
    assert_nonfinite_like_reference(FORMS[form][0], args)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_once_for_all_lengths(form):
    calls = [inputs(form, B, N) for B, N in ((2, 5), (3, 7), (4, 6))]
    assert_compiles_once(FORMS[form][0], calls)


def test_opcheck():
    x, branch, gate, shift, scale, bias = inputs("both_bias", N=3, C=24)
    with use_backend(BACKEND):
        for args in (
            (x, branch, gate, bias, shift, scale, 1e-6, None, 0),
            (x, None, None, None, shift, scale, 1e-6, None, 0),
            (x, branch, gate, None, None, None, 0.0, None, 0),
        ):
            args = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
            torch.library.opcheck(op.forward_op.torch_op, tuple(args))
        torch.library.opcheck(
            op.backward_op.torch_op, (x, x, x, branch, gate, bias, scale, 1e-6, None, 0)
        )
        torch.library.opcheck(
            op.jvp_op, (x, branch, gate, bias, scale, x, x, gate, bias, shift, scale, 1e-6, None, 0)
        )


@sweep(
    25,
    form=st.sampled_from(sorted(FORMS)),
    B=st.integers(1, 4),
    N=st.integers(1, 40),
    C=st.integers(3, 300),  # of two channels, LN has no derivative to speak of
    dtype=st.sampled_from(DTYPES),
    shared=st.booleans(),
)
def test_any_shape(form, B, N, C, dtype, shared):
    fused, eager, *_ = FORMS[form]
    assert_parity(fused, eager, inputs(form, B, N, C, dtype, rows=1 if shared else B))


@pytest.mark.parametrize("form", FORMS)
def test_float64_runs_on_the_reference(form):
    fused, eager, *_ = FORMS[form]
    args = inputs(form, dtype=torch.float64)
    with use_backend(BACKEND):
        ours = fused(*args)
    torch.testing.assert_close(ours, eager(*args), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, b, g, s, c: (x, b[:, 1:], g, s, c), "branch must be shaped as x"),
        (lambda x, b, g, s, c: (x, b, g[:, 1:], s, c), r"gate must be \(2, 96\) or \(1, 96\)"),
        (lambda x, b, g, s, c: (x, b, g, s[None], c), "shift must be"),
        (lambda x, b, g, s, c: (x, b, g, s, c.repeat(2, 1)), "scale must be"),
        (lambda x, b, g, s, c: (x[0], b[0], g, s, c), r"x must be \(B, N, …\)"),
        (lambda x, b, g, s, c: (x.long(), b, g, s, c), "floating-point"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        both(*change(*inputs("both")))


def test_other_ranks_and_gaps_are_refused():
    x, shift, scale = inputs("norm", B=2, N=6)
    with pytest.raises(ValueError, match=r"x must be \(B, N, C\), got \(2, 2, 3, 96\)"):
        ada_layer_norm(x.unflatten(1, (2, 3)), shift, scale)
    offsets = torch.tensor([[0, 9], [2, 9], [6, 9]], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="cu_seqlens must be contiguous, got stride 2"):
        ada_layer_norm(x[0], shift, scale, segments=Segments(offsets[:, 0], 4))
    with pytest.raises(ValueError, match=r"x must be \(T, C\), packed"):
        segments = Segments(offsets[:, 0].contiguous(), 4)
        ada_layer_norm(x[0].unflatten(1, (2, 48)), shift, scale, segments=segments)
