import pytest
import torch
import torch.nn.functional as F
from contract import Contract, Problem, over, with_gradients
from parity import (
    BACKEND,
    DEVICE,
    DTYPES,
    WIDTHS,
    assert_nonfinite_like_reference,
    assert_parity,
    noise,
)
from sweep import st

from tim_kernels.dispatch.backend import use_backend
from tim_kernels.launch.views import view_matrix
from tim_kernels.swiglu import op
from tim_kernels.swiglu.op import swiglu


def eager(gate, value):
    return (F.silu(gate) * value).to(gate.dtype)


def eager_packed(x):
    return eager(*x.chunk(2, dim=-1))


def eager_biased(gate, value, gate_bias, value_bias):
    return eager(gate + gate_bias.to(gate.dtype), value + value_bias.to(value.dtype))


def eager_packed_biased(x, gate_bias, value_bias):
    return eager_biased(*x.chunk(2, dim=-1), gate_bias, value_bias)


def packed_biased(x, gate_bias, value_bias):
    return swiglu(x, None, gate_bias, value_bias)


FORMS = {
    "two": eager, "packed": eager_packed, "two, biased": eager_biased,
    "packed, biased": eager_packed_biased,
}  # fmt: skip
PLAIN = ("two", "packed")


def problem(form, shape=(2, 3), C=None, dtype=torch.float32, value_dtype=None, bias_dtype=None):
    """Tensors of `shape`, or of `shape` and C columns."""
    if C is not None:
        shape = (*shape, C)
    if form.startswith("packed"):
        inputs = [3 * noise(*shape[:-1], 2 * shape[-1], dtype=dtype, device=DEVICE)]
    else:
        value = noise(*shape, seed=1, dtype=value_dtype or dtype, device=DEVICE)
        inputs = [3 * noise(*shape, dtype=dtype, device=DEVICE), value]
    if form in PLAIN:
        return Problem(swiglu, FORMS[form], inputs)
    bias_dtype = bias_dtype or dtype
    inputs += [noise(shape[-1], seed=s, dtype=bias_dtype, device=DEVICE) for s in (2, 3)]
    return Problem(swiglu if form.startswith("two") else packed_biased, FORMS[form], inputs)


class TestSwiGLU(Contract):
    problem = staticmethod(problem)
    parity = [
        *over(form=FORMS, dtype=[*DTYPES], C=[*WIDTHS, 576, 2048, 3072]),
        dict(form="two", shape=(3, 5), C=96, dtype=torch.bfloat16, value_dtype=torch.float32),
        dict(form="two", shape=(3, 5), C=96, dtype=torch.float32, value_dtype=torch.float16),
        dict(form="two, biased", C=96, dtype=torch.bfloat16, bias_dtype=torch.float32),
        dict(form="packed, biased", C=100, dtype=torch.float16, bias_dtype=torch.bfloat16),
    ]
    on_cpu = over(form=FORMS, dtype=[*DTYPES], C=1152)
    empty = over(form=FORMS, shape=[(0,), (0, 8), (2, 0, 8), (0, 3, 8)])
    layout = over(form=FORMS, shape=[(2, 7)], C=[96, 100, 33])
    partial = over(form=FORMS, shape=(2, 3, 4))
    repeated = over(form=FORMS, shape=(3, 50), C=96)
    small = over(form=FORMS, C=6)
    float64 = over(form=FORMS, C=8)
    compiled = [over(form=form, shape=[(2, 5), (3, 7), (4, 6)], C=96) for form in FORMS]
    draws = dict(
        form=st.sampled_from(sorted(FORMS)),
        shape=st.lists(st.integers(1, 5), max_size=3),
        C=st.integers(4, 300),
        dtype=st.sampled_from(DTYPES),
    )

    def operators(self):
        gate, value = problem("two", (3, 24)).inputs
        yield op.forward_op, with_gradients(gate, value)
        yield op.forward_op, with_gradients(gate, None)
        yield op.backward_op, (value, gate, value)
        yield op.backward_op, (value[:, :12], gate, None)
        yield op.forward_op.jvp, (gate, value, value, None)
        yield op.forward_op.jvp, (gate, None, value, None)
        bias = value[0]
        yield op.biased_op, with_gradients(gate, value, bias, None)
        yield op.biased_op, with_gradients(gate, None, None, bias[:12])
        yield op.biased_backward_op, (value, gate, value, bias, None)
        yield op.biased_backward_op, (value[:, :12], gate, None, bias[:12], bias[12:])
        yield op.biased_op.jvp, (gate, value, bias, None, None, value, bias, None)


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (5, 384), (1, 1, 9), (2, 3, 4, 5), (33, 64)])
@pytest.mark.parametrize("form", FORMS)
def test_any_leading_shape(form, shape):
    assert_parity(*problem(form, shape))


@pytest.mark.parametrize("C", [96, 100, 33])
def test_halves_of_one_tensor_are_read_in_place(C):
    x = noise(2, 7, 2 * C, device=DEVICE)
    gate, value = x.chunk(2, dim=-1)
    assert view_matrix((value,), 0)[0].change is None
    with use_backend(BACKEND):
        expected = swiglu(gate.contiguous(), value.contiguous())
        assert torch.equal(swiglu(x), expected)
        assert torch.equal(swiglu(gate, value), expected)
        wide = torch.cat((x, x), dim=1)
        assert torch.equal(swiglu(wide[:, 7:]), expected)
        row = noise(1, 1, C, seed=2, device=DEVICE).expand_as(gate)
        assert torch.equal(swiglu(gate, row), swiglu(gate, row.contiguous()))


def test_strided_gradient():
    """A cotangent that is one row for all tokens, as that of a sum over them."""
    for form in FORMS:
        fused, _, (leaf, *rest) = problem(form, (4, 96))
        leaf.requires_grad_()
        with use_backend(BACKEND):
            broadcast = torch.autograd.grad(fused(leaf, *rest).sum(0).sum(), leaf)[0]
            dense = torch.autograd.grad(fused(leaf, *rest), leaf, torch.ones(4, 96).to(leaf))[0]
        assert torch.equal(broadcast, dense)


@pytest.mark.parametrize("which", [0, 1])
def test_one_bias_alone(which):
    gate, value, *biases = problem("two, biased", (5,), 96).inputs
    dout, zero = noise(5, 96, seed=9, device=DEVICE), torch.zeros(96, device=DEVICE)
    given = [bias.requires_grad_() if i == which else None for i, bias in enumerate(biases)]
    both = [zero if bias is None else bias for bias in given]
    with use_backend(BACKEND):
        outs = [swiglu(gate, value, *each) for each in (given, both)]
        sums = [torch.autograd.grad(out, biases[which], dout)[0] for out in outs]
    assert torch.equal(*outs) and torch.equal(*sums)


@pytest.mark.parametrize("C, rows", [(96, 300), (600, 150), (1100, 140)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_many_tokens_over_several_programs(dtype, C, rows):
    gate, value, *biases = problem("two, biased", (rows,), C, dtype).inputs
    dout = noise(rows, C, seed=9, dtype=dtype, device=DEVICE)
    leaves = [bias.requires_grad_() for bias in biases]
    with use_backend(BACKEND):
        ours = torch.autograd.grad(swiglu(gate, value, *biases), leaves, dout)
    wide = [x.detach().double() for x in (gate, value, *biases)]
    wide_leaves = [bias.requires_grad_() for bias in wide[2:]]
    expected = torch.autograd.grad(swiglu(*wide), wide_leaves, dout.double())
    for sums, truth in zip(ours, expected, strict=True):  # one rounding, of the sum in float32
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(sums.double(), truth, rtol=rounding, atol=2e-5)


@pytest.mark.parametrize("form", PLAIN)
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
        ((torch.ones(2, 4), None, torch.ones(4)), r"gate_bias must be \(2,\), got \(4,\)"),
        ((torch.ones(4), torch.ones(4), None, torch.ones(1)), r"value_bias must be \(4,\)"),
    ],
)
def test_refusals(args, message):
    with pytest.raises(ValueError, match=message):
        swiglu(*args)
