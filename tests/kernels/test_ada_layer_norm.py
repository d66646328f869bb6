import pytest
import torch
import torch.nn.functional as F
from contract import Contract, Problem, over, with_gradients
from parity import BACKEND, DEVICE, DTYPES, WIDTHS, as_tuple, assert_parity, noise
from sweep import st

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


def both(x, branch, gate, shift, scale, bias=None, segments=None):
    return gated_residual_ada_layer_norm(
        x, branch, gate, shift, scale, branch_bias=bias, segments=segments
    )


FORMS = {  # the op, its eager twin, how many token tensors and conditioning rows it takes
    "norm": (ada_layer_norm, eager_norm, 1, 2),
    "residual": (gated_residual, eager_residual, 2, 1),
    "residual_bias": (gated_residual, eager_residual, 2, 2),
    "both": (both, eager_both, 2, 3),
    "both_bias": (both, eager_both, 2, 4),
}


def problem(form, B=2, N=5, C=96, dtype=torch.float32, cond_dtype=None, is_shared=False):
    """B samples of N tokens; `is_shared` is one conditioning row for all samples."""
    fused, eager, n_tokens, n_rows = FORMS[form]
    rows = 1 if is_shared else max(B, 1)
    inputs = [noise(B, N, C, seed=i, dtype=dtype, device=DEVICE) for i in range(n_tokens)]
    for i in range(n_rows):
        inputs.append(noise(rows, C, seed=10 + i, dtype=cond_dtype or dtype, device=DEVICE))

    def twin(*args):
        return tuple(out.to(dtype) for out in as_tuple(eager(*args)))

    return Problem(fused, twin if cond_dtype else eager, inputs)


class TestAdaLayerNorm(Contract):
    problem = staticmethod(problem)
    parity = [
        *over(form=FORMS, dtype=[*DTYPES], C=[*WIDTHS]),
        *over(form=FORMS, B=[1], N=[1, 9], C=72),
        *over(form=FORMS, B=[3], N=[1, 70], C=72),
        *over(form=FORMS, B=3, dtype=torch.bfloat16, cond_dtype=torch.float32, is_shared=True),
    ]
    on_cpu = over(form=FORMS, dtype=[*DTYPES], N=16, C=1152)
    empty = [*over(form=FORMS, B=0, N=[0, 3], C=8), *over(form=FORMS, B=2, N=0, C=8)]
    layout = over(form=FORMS, B=2, N=7)
    partial = over(form=FORMS, B=2, N=3, C=12)
    tangent_tolerance = dict(rtol=1e-4, atol=1e-5)
    repeated = over(form=FORMS, B=2, N=70)
    small = over(form=FORMS, B=1, N=2, C=6)
    nonfinite = over(form=FORMS, N=4)
    float64 = over(form=FORMS)
    float64_tolerance = 1e-12
    compiled = [[dict(form=form, B=B, N=N) for B, N in ((2, 5), (3, 7), (4, 6))] for form in FORMS]
    draws = dict(
        form=st.sampled_from(sorted(FORMS)),
        B=st.integers(1, 4),
        N=st.integers(1, 40),
        C=st.integers(3, 300),  # of two channels, LN has no derivative to speak of
        dtype=st.sampled_from(DTYPES),
        is_shared=st.booleans(),
    )

    def poison(self, inputs):
        inputs[0][0, 0, 3], inputs[0][0, 2, 3] = float("nan"), float("inf")
        inputs[-1][1, 5] = float("-inf")

    def operators(self):
        x, branch, gate, shift, scale, bias = problem("both_bias", N=3, C=24).inputs
        rest = None, None, 1e-6, "layer", None, 0
        yield op.forward_op, with_gradients(x, branch, gate, bias, shift, scale, *rest)
        yield op.forward_op, with_gradients(x, None, None, None, shift, scale, *rest)
        plain = None, None, 0.0, None, None, 0
        yield op.forward_op, with_gradients(x, branch, gate, None, None, None, *plain)
        yield op.backward_op, (x, x, x, branch, gate, bias, scale, *rest)
        tangents = x, x, gate, bias, shift, scale, None, None
        yield op.forward_op.jvp, (x, branch, gate, bias, shift, scale, *rest, *tangents)


@pytest.mark.parametrize("form", ["both", "both_bias"])
@pytest.mark.parametrize("B, N", [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_do_for_a_gradient_of_one_output(form, B, N):
    fused, _, inputs = problem(form, B, N, C=8)
    leaves = [x.requires_grad_() for x in inputs]
    with use_backend(BACKEND):
        fused(*leaves)[0].sum().backward()
    for leaf in leaves:
        assert leaf.grad is None or not leaf.grad.any()


def test_views_of_packed_tensors_are_read_in_place():
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
    fused, eager, n_tokens, n_rows = FORMS[form]
    lengths = torch.tensor([3, 0, 1, 6, 0], device=DEVICE)
    cu = torch.tensor([0, 3, 3, 4, 10, 10], dtype=torch.int32, device=DEVICE)
    segments = Segments(cu, max_length=8)
    tokens = [noise(10, 72, seed=i, device=DEVICE) for i in range(n_tokens)]
    rows = [noise(5, 72, seed=10 + i, device=DEVICE) for i in range(n_rows)]

    def packed(*args):
        return fused(*args, segments=segments)

    def apart(*args):
        tokens = [x[:, None] for x in args[:n_tokens]]
        rows = [row.repeat_interleave(lengths, dim=0) for row in args[n_tokens:]]
        return tuple(out[:, 0] for out in as_tuple(eager(*tokens, *rows)))

    assert_parity(packed, apart, tokens + rows)


def test_mean_far_from_zero():
    x, shift, scale = problem("norm", C=1152).inputs
    assert_parity(ada_layer_norm, eager_norm, [x + 1e4, shift, scale])


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
        both(*change(*problem("both").inputs))


def test_other_ranks_and_gaps_are_refused():
    x, shift, scale = problem("norm", B=2, N=6).inputs
    with pytest.raises(ValueError, match=r"x must be \(B, N, C\), got \(2, 2, 3, 96\)"):
        ada_layer_norm(x.unflatten(1, (2, 3)), shift, scale)
    offsets = torch.tensor([[0, 9], [2, 9], [6, 9]], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="cu_seqlens must be contiguous, got stride 2"):
        ada_layer_norm(x[0], shift, scale, segments=Segments(offsets[:, 0], 4))
    with pytest.raises(ValueError, match=r"x must be \(T, C\), packed"):
        segments = Segments(offsets[:, 0].contiguous(), 4)
        ada_layer_norm(x[0].unflatten(1, (2, 48)), shift, scale, segments=segments)
