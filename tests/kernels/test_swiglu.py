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
from tim_kernels.swiglu.op import swiglu, swiglu_with_paths


def eager(gate, value):
    return (F.silu(gate) * value).to(gate.dtype)


def eager_packed(x):
    return eager(*x.chunk(2, dim=-1))


def eager_with_paths(gate, value, gate_path, value_path):
    return eager(gate + gate_path.to(gate.dtype), value + value_path.to(value.dtype))


def eager_packed_with_paths(x, gate_path, value_path):
    return eager_with_paths(*x.chunk(2, dim=-1), gate_path, value_path)


def packed_with_paths(x, gate_path, value_path):
    return swiglu_with_paths(x, None, gate_path, value_path)


FORMS = {
    "two": eager, "packed": eager_packed, "two, summed": eager_with_paths,
    "packed, summed": eager_packed_with_paths,
}  # fmt: skip
PLAIN = ("two", "packed")


def problem(form, shape=(2, 3), C=None, dtype=torch.float32, value_dtype=None, path_dtype=None):
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
    path_dtype = path_dtype or dtype
    inputs += [torch.zeros(shape[-1], dtype=path_dtype, device=DEVICE) for _ in range(2)]
    return Problem(
        swiglu_with_paths if form.startswith("two") else packed_with_paths, FORMS[form], inputs
    )


class TestSwiGLU(Contract):
    problem = staticmethod(problem)
    parity = [
        *over(form=FORMS, dtype=[*DTYPES], C=[*WIDTHS, 576, 2048, 3072]),
        dict(form="two", shape=(3, 5), C=96, dtype=torch.bfloat16, value_dtype=torch.float32),
        dict(form="two", shape=(3, 5), C=96, dtype=torch.float32, value_dtype=torch.float16),
        dict(form="two, summed", C=96, dtype=torch.bfloat16, path_dtype=torch.float32),
        dict(form="packed, summed", C=100, dtype=torch.float16, path_dtype=torch.bfloat16),
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
        path = torch.zeros_like(value[0])
        yield op.summed_op, with_gradients(gate, value, path, None)
        yield op.summed_op, with_gradients(gate, None, None, path[:12])
        yield op.summed_backward_op, (value, gate, value)
        yield op.summed_backward_op, (value[:, :12], gate, None)
        yield op.summed_op.jvp, (gate, value, path, None, None, value, value[0], None)


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
def test_one_path_alone(which):
    gate, value, *paths = problem("two, summed", (5,), 96).inputs
    dout = noise(5, 96, seed=9, device=DEVICE)
    given = [path.requires_grad_() if i == which else None for i, path in enumerate(paths)]
    with use_backend(BACKEND):
        outs = [swiglu_with_paths(gate, value, *each) for each in (given, paths)]
        sums = [torch.autograd.grad(out, paths[which], dout)[0] for out in outs]
        assert torch.equal(outs[0], swiglu(gate, value))
    assert torch.equal(*outs) and torch.equal(*sums)


@pytest.mark.parametrize("C, rows", [(96, 300), (600, 150), (1100, 140)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_many_tokens_over_several_programs(dtype, C, rows):
    gate, value, *paths = problem("two, summed", (rows,), C, dtype).inputs
    dout = noise(rows, C, seed=9, dtype=dtype, device=DEVICE)
    leaves = [path.requires_grad_() for path in paths]
    with use_backend(BACKEND):
        ours = torch.autograd.grad(swiglu_with_paths(gate, value, *paths), leaves, dout)
    wide = [x.detach().double().requires_grad_() for x in (gate, value)]
    expected = torch.autograd.grad(swiglu(*wide), wide, dout.double())
    for sums, truth in zip(ours, expected, strict=True):  # one rounding, of the sum in float32
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(sums.double(), truth.sum(0), rtol=rounding, atol=2e-5)


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
    ],
)
def test_refusals(args, message):
    with pytest.raises(ValueError, match=message):
        swiglu(*args)


def test_paths_that_are_not_of_the_width_are_refused():
    with pytest.raises(ValueError, match=r"gate_path must be \(2,\), got \(4,\)"):
        swiglu_with_paths(torch.ones(2, 4), None, torch.ones(4), None)
    with pytest.raises(ValueError, match=r"value_path must be \(4,\), got \(1,\)"):
        swiglu_with_paths(torch.ones(4), torch.ones(4), None, torch.ones(1))
