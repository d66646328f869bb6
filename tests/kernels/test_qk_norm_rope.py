"""Parity, derivatives and compilation in every form, dtype and size."""

import pytest
import torch
from parity import (
    BACKEND,
    DEVICE,
    DTYPES,
    assert_adjoint,
    assert_compiles_once,
    assert_gradcheck,
    assert_nonfinite_like_reference,
    assert_parity,
    assert_same_every_run,
    noise,
)
from qk_norm_rope_forms import FORMS, both, bound, eager_both, inputs
from sweep import st, sweep

from tim_kernels.dispatch.backend import use_backend
from tim_kernels.qk_norm_rope import op, reference
from tim_kernels.qk_norm_rope.op import qk_norm_rope

HEAD_DIMS = (8, 12, 64, 72, 80, 96, 100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_parity(form, dtype):
    for D in HEAD_DIMS if form == "both" and dtype == torch.bfloat16 else (72,):
        assert_parity(*bound(form, (2, 3)), inputs(form, 1, D=D, dtype=dtype))


@pytest.mark.parametrize("B, h, w, H", [(1, 1, 1, 1), (2, 1, 1, 3), (1, 1, 9, 6), (1, 5, 7, 1)])
@pytest.mark.parametrize("form", ["both", "alone"])
def test_sizes(form, B, h, w, H):
    assert_parity(*bound(form, (h, w), order="grid"), inputs(form, B, h * w, H))


@pytest.mark.parametrize("D", [4, 128, 160, 256])
def test_other_head_dims(D):
    assert_parity(*bound("both", (1, 3)), inputs("both", 1, 3, 1, D))


@pytest.mark.parametrize("H", [12, 20])
def test_many_heads(H):
    assert_parity(*bound("both", (1, 2)), inputs("both", 1, 2, H, 8))


def test_odd_head_dim_without_rotation():
    assert_parity(*bound("alone_unturned"), inputs("alone_unturned", D=7))


@pytest.mark.parametrize("B, N", [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_do(form, B, N):
    fused, _ = bound(form, (1, N))
    leaves = [x.requires_grad_() for x in inputs(form, B, N, D=8, rows=max(B, 1))]
    with use_backend(BACKEND):
        out = fused(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        assert all(o.shape == (B, N, 2, 8) for o in out)
        sum(o.sum() for o in out).backward()
    for leaf in leaves:
        assert leaf.grad is None or not leaf.grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_one_row_for_all_samples_and_mixed_dtypes(form):
    fused, eager = bound(form, (2, 3))
    args = inputs(form, B=3, dtype=torch.bfloat16, row_dtype=torch.float32, rows=1)

    def mixed(*args):  # eager LayerNorm wants one dtype
        out = eager(*(x.to(torch.promote_types(x.dtype, torch.float32)) for x in args))
        out = out if isinstance(out, tuple) else (out,)
        return tuple(o.to(args[0].dtype) for o in out)

    assert_parity(fused, mixed, args)


def test_key_of_another_dtype():
    q, k, *rows = inputs("both")
    with use_backend(BACKEND):
        new_q, new_k = both(q.half(), k.bfloat16(), *rows, grid=(2, 3))
        plain_k = qk_norm_rope(k.bfloat16(), None, *rows[2:4], grid=(2, 3), q_shift=rows[5])
    assert new_q.dtype == torch.float16 and new_k.dtype == torch.bfloat16
    assert torch.equal(new_k, plain_k)


@pytest.mark.parametrize("form", ["both", "packed_qkv", "shift_alone"])
def test_reruns_are_equal_and_derivatives_adjoint(form):
    fused, _ = bound(form, (5, 8))
    args = inputs(form, B=2, N=40, D=12)
    assert_same_every_run(fused, args)
    assert_adjoint(fused, args)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    assert_gradcheck(bound(form, (1, 2))[0], inputs(form, B=1, N=2, D=8))


def test_gradient_of_one_output_only():
    args = inputs("both")
    for i in (0, 1):
        leaves = [x.clone().requires_grad_() for x in args]
        twins = [x.clone().requires_grad_() for x in args]
        with use_backend(BACKEND):
            both(*leaves, grid=(2, 3))[i].square().sum().backward()
        eager_both(*twins, grid=(2, 3))[i].square().sum().backward()
        for a, b in zip(leaves, twins, strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert b.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_tangent_of_some_inputs_only():
    args = inputs("both")
    fused, eager = bound("both", (2, 3))
    for i, x in enumerate(args):

        def of_one(function, y, i=i):
            return function(*args[:i], y, *args[i + 1 :])

        direction = noise(*x.shape, seed=30 + i, device=DEVICE)
        with use_backend(BACKEND):
            ours = torch.func.jvp(lambda y: of_one(fused, y), (x,), (direction,))[1]
        theirs = torch.func.jvp(lambda y: of_one(eager, y), (x,), (direction,))[1]
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_mean_far_from_zero():
    q, k, *rows = inputs("both_unshifted", D=72)
    assert_parity(*bound("both_unshifted", (2, 3)), [q + 1e4, k + 1e4, *rows])


@pytest.mark.parametrize("form", FORMS)
def test_nan_and_infinity(form):
    args = inputs(form, N=4)
    for row, value in ((0, float("nan")), (2, float("inf"))):
        args[0][0, row, 0, 3] = value
    args[-1].flatten(1 if args[-1].ndim > 1 else 0)[..., 5] = float("-inf")
    assert_nonfinite_like_reference(bound(form, (2, 2))[0], args)


@pytest.mark.parametrize("form", ["packed_qkv", "alone_unturned"])
def test_compiles_once_for_all_lengths(form):
    fused, *_, is_turned = FORMS[form]
    calls = [inputs(form, B, h * w, H=5) for B, h, w in ((2, 2, 3), (3, 3, 5), (4, 4, 2))]
    if not is_turned:
        return assert_compiles_once(fused, calls)

    def turned(x, *rest):
        h = x.shape[0]  # so that the grid changes as well
        return fused(x, *rest, grid=(h, x.shape[1] // h))

    assert_compiles_once(turned, calls)


@pytest.mark.parametrize("form", ("both", "alone", "packed_qkv"))
def test_float64_runs_on_the_reference(form):
    fused, _ = bound(form, (2, 3))
    args = inputs(form, dtype=torch.float64)
    with use_backend(BACKEND):
        ours = fused(*args)
    with use_backend("reference"):
        torch.testing.assert_close(ours, fused(*args), rtol=0, atol=0)


def test_opcheck():
    q, k, *rows = inputs("both", N=3)
    affine, shifts = rows[:4], rows[4:]
    at = torch.tensor([[0, 1], [2, 3], [4, 5]], device=DEVICE)
    sizes = torch.tensor([3, 3], dtype=torch.int32, device=DEVICE)
    with use_backend(BACKEND):
        for args in (
            (q, k, *affine, *shifts, None, 3, None, 1e-5, None, 0),
            (q, None, *affine[:2], None, None, None, None, None, 0, sizes, 1e-5, None, 0),
        ):
            args = [
                a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point()
                else a for a in args
            ]  # fmt: skip
            torch.library.opcheck(op.forward_op.torch_op, tuple(args))
        weights = affine[0], affine[2]
        tail = at, 0, None, 1e-5, None, 0
        torch.library.opcheck(op.backward_op.torch_op, (q, k, q, k, *weights, *shifts, *tail))
        qkv = torch.stack((q, k, q), dim=2)
        torch.library.opcheck(
            op.packed_backward_op.torch_op, (q, k, q, qkv, *weights, *shifts, *tail)
        )
        torch.library.opcheck(
            op.jvp_op.torch_op, (q, k, *weights, *shifts, q, k, *affine, *shifts, *tail)
        )


@sweep(
    8,
    form=st.sampled_from(sorted(FORMS)),
    B=st.integers(1, 3),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    H=st.integers(1, 3),
    D=st.integers(1, 25),
    order=st.sampled_from(reference.ORDERS),
    dtype=st.sampled_from(DTYPES),
    shared=st.booleans(),
)
def test_any_shape(form, B, h, w, H, D, order, dtype, shared):
    args = inputs(form, B, h * w, H, 4 * D, dtype, rows=1 if shared else B)
    assert_parity(*bound(form, (h, w), order=order), args)
