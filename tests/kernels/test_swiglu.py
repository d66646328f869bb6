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

from tim_kernels.dispatch.backend import use_backend
from tim_kernels.swiglu import op
from tim_kernels.swiglu.op import swiglu


def eager(gate, value):
    return F.silu(gate) * value


def eager_packed(x):
    return eager(*x.chunk(2, dim=-1))


FORMS = {"two": (swiglu, eager), "packed": (swiglu, eager_packed)}


def inputs(form, *shape, dtype=torch.float32, value_dtype=None):
    if form == "packed":
        return [3 * noise(*shape[:-1], 2 * shape[-1], dtype=dtype, device=DEVICE)]
    value = noise(*shape, seed=1, dtype=value_dtype or dtype, device=DEVICE)
    return [3 * noise(*shape, dtype=dtype, device=DEVICE), value]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_parity(form, dtype):
    for C in (*WIDTHS, 576, 2048, 3072):
        assert_parity(*FORMS[form], inputs(form, 2, 3, C, dtype=dtype))


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (5, 384), (1, 1, 9), (2, 3, 4, 5), (33, 64)])
@pytest.mark.parametrize("form", FORMS)
def test_any_leading_shape(form, shape):
    assert_parity(*FORMS[form], inputs(form, *shape))


@pytest.mark.parametrize("shape", [(0,), (0, 8), (2, 0, 8), (0, 3, 8)])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_do(form, shape):
    leaves = [x.requires_grad_() for x in inputs(form, *shape)]
    with use_backend(BACKEND):
        out = swiglu(*leaves)
        assert out.shape == shape
        out.sum().backward()
        plain = tuple(leaf.detach() for leaf in leaves)
        assert torch.func.jvp(swiglu, plain, plain)[1].shape == shape
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


def test_mixed_dtypes():
    for dtype, value_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        args = inputs("two", 3, 5, 96, dtype=dtype, value_dtype=value_dtype)
        assert_parity(swiglu, lambda g, v: eager(g, v).to(g.dtype), args)


@pytest.mark.parametrize("C", [96, 100, 33])
def test_strided_input_is_read_in_place(C):
    from tim_kernels.launch.views import view_matrix

    x = noise(2, 7, 2 * C, device=DEVICE)
    gate, value = x.chunk(2, dim=-1)
    assert not view_matrix(value).is_copied
    with use_backend(BACKEND):
        expected = swiglu(gate.contiguous(), value.contiguous())
        assert torch.equal(swiglu(x), expected)
        assert torch.equal(swiglu(gate, value), expected)
        assert torch.equal(swiglu(gate.mT.contiguous().mT, value), expected)
        wide = torch.cat((x, x), dim=1)
        assert torch.equal(swiglu(wide[:, 7:]), expected)
        gaps = noise(2, 7, 4 * C, device=DEVICE)[:, :, ::2]
        assert torch.equal(swiglu(gaps), swiglu(gaps.contiguous()))
        row = noise(1, 1, C, seed=2, device=DEVICE).expand_as(gate)
        assert torch.equal(swiglu(gate, row), swiglu(gate, row.contiguous()))


def test_strided_gradient():
    """A cotangent that is one row for all tokens, as that of a sum over them."""
    for form in FORMS:
        (leaf, *rest) = inputs(form, 4, 96)
        leaf.requires_grad_()
        with use_backend(BACKEND):
            broadcast = torch.autograd.grad(swiglu(leaf, *rest).sum(0).sum(), leaf)[0]
            dense = torch.autograd.grad(swiglu(leaf, *rest), leaf, torch.ones(4, 96).to(leaf))[0]
        assert torch.equal(broadcast, dense)


@pytest.mark.parametrize("form", FORMS)
def test_reruns_are_equal_and_derivatives_adjoint(form):
    args = inputs(form, 3, 50, 96)
    assert_same_every_run(swiglu, args)
    assert_adjoint(swiglu, args)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    assert_gradcheck(swiglu, inputs(form, 2, 3, 6))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_infinity_and_overflow(form, dtype):
    special = torch.tensor([0.0, -0.0, 1e-4, 9.0, -9.0, 3e4, -3e4, 65504.0, -65504.0, torch.nan])
    special = torch.cat((special, torch.tensor([torch.inf, -torch.inf]))).to(dtype)
    gate, value = torch.meshgrid(special, special, indexing="ij")
    args = [torch.cat((gate, value), dim=-1)] if form == "packed" else [gate, value]
    assert_nonfinite_like_reference(swiglu, [x.to(DEVICE) for x in args])


def test_float16_gate_neither_overflows_nor_underflows_early():
    gate = torch.tensor([-80.0, -12.0, 60000.0], dtype=torch.float16, device=DEVICE)
    value = torch.tensor([6e4, 6e4, 1.0], dtype=torch.float16, device=DEVICE)
    with use_backend(BACKEND):
        out = swiglu(gate, value)
    assert torch.equal(out, eager(gate.double(), value.double()).half())


@pytest.mark.parametrize("form", FORMS)
def test_compiles_once_for_all_lengths(form):
    assert_compiles_once(swiglu, [inputs(form, B, N, 96) for B, N in ((2, 5), (3, 7), (4, 6))])


def test_opcheck():
    gate, value = inputs("two", 3, 24)
    leaves = gate.detach().requires_grad_(), value.detach().requires_grad_()
    with use_backend(BACKEND):
        torch.library.opcheck(op.forward_op.torch_op, leaves)
        torch.library.opcheck(op.forward_op.torch_op, (leaves[0], None))
        torch.library.opcheck(op.backward_op.torch_op, (value, gate, value))
        torch.library.opcheck(op.backward_op.torch_op, (value[:, :12], gate, None))
        torch.library.opcheck(op.jvp_op.torch_op, (gate, value, value, None))
        torch.library.opcheck(op.jvp_op.torch_op, (gate, None, value, None))


@sweep(
    25,
    form=st.sampled_from(sorted(FORMS)),
    leading=st.lists(st.integers(1, 5), max_size=3),
    C=st.integers(4, 300),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(form, leading, C, dtype):
    assert_parity(*FORMS[form], inputs(form, *leading, C, dtype=dtype))


def test_double_runs_on_the_reference():
    gate, value = (x.double() for x in inputs("two", 3, 8))
    with use_backend(BACKEND):
        assert torch.equal(swiglu(gate, value), eager(gate, value))


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(2, 3),), r"even width; got \(2, 3\)"),
        ((torch.ones(2, 4), torch.ones(2, 3)), r"value must be shaped as gate, \(2, 4\)"),
        ((torch.ones(4), torch.ones(1, 4)), "value must be shaped as gate"),
        ((torch.ones(2, 4).long(),), "gate must be floating-point"),
        ((torch.ones(4), torch.ones(4).bool()), "value must be floating-point"),
        ((torch.tensor(1.0),), "got a scalar"),
        ((torch.ones(4), torch.ones(4, device="meta")), "value must be on cpu"),
    ],
)
def test_refusals(args, message):
    with pytest.raises(ValueError, match=message):
        swiglu(*args)
