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
from sweep import st, sweep

from tim_kernels.coefficients import per_sample
from tim_kernels.dispatch.backend import use_backend
from tim_kernels.transition_inputs import op
from tim_kernels.transition_inputs.op import transition_inputs

FORMS = {"state": (), "velocity": (1,), "neighbours": (2,), "all": (1, 2)}  # rows a trailing sample


def function(form):
    """The op as a function of x, z, α, σ and the form's own coefficients."""

    def call(x, z, alpha, sigma, *rest):
        velocity = rest[:2] if 1 in FORMS[form] else (None, None)
        neighbours = rest[-2:] if 2 in FORMS[form] else (None, None)
        outputs = transition_inputs(x, z, alpha, sigma, *velocity, *neighbours)
        return tuple(o for o in outputs if o is not None)

    return call


def eager(x, z, alpha, sigma, *rest, form, trailing):
    outputs = [(per_sample(alpha, x) * x + per_sample(sigma, z) * z).to(x.dtype)]
    x, z = x[len(x) - trailing :], z[len(z) - trailing :]
    for sides, a, b in zip(FORMS[form], rest[::2], rest[1::2], strict=True):
        u, w = (torch.cat([v] * sides) for v in (x, z))
        outputs.append((per_sample(a, u) * u + per_sample(b, w) * w).to(x.dtype))
    return tuple(outputs)


def inputs(form, shape=(3, 4, 5, 8), trailing=2, dtype=torch.float32, row_dtype=None):
    def vector(n, seed):
        return noise(n, seed=seed, dtype=row_dtype or dtype, device=DEVICE)

    latents = [noise(*shape, seed=i, dtype=dtype, device=DEVICE) for i in range(2)]
    rows = [vector(shape[0], 10), vector(shape[0], 11)]
    for sides in FORMS[form]:
        rows += [vector(sides * trailing, 20 + sides), vector(sides * trailing, 30 + sides)]
    return latents + rows


def check(form, shape, trailing, dtype=torch.float32, row_dtype=None):
    def twin(*args):
        return eager(*args, form=form, trailing=trailing)

    assert_parity(function(form), twin, inputs(form, shape, trailing, dtype, row_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_parity(form, dtype):
    check(form, (3, 4, 16, 18), 2, dtype)
    check(form, (2, 3, 5, 7), 1, dtype)
    check(form, (2, 4, 6), 2, dtype, torch.float32)


@pytest.mark.parametrize(
    "shape, trailing", [((1, 1), 1), ((1, 1, 1, 1), 0), ((4, 3), 4), ((2, 2, 33, 17), 0)]
)
def test_sizes(shape, trailing):
    check("all", shape, trailing)


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 4, 0, 3)])
def test_nothing_to_do(shape):
    leaves = [x.requires_grad_() for x in inputs("all", shape, min(shape[0], 1))]
    with use_backend(BACKEND):
        x_t, v_t, x_pm = function("all")(*leaves)
        assert x_t.shape == shape and v_t.shape[1:] == x_pm.shape[1:] == shape[1:]
        (x_t.sum() + v_t.sum() + x_pm.sum()).backward()
    assert not any(leaf.grad.any() for leaf in leaves)


def test_what_was_not_asked_for_is_none():
    for backend in ("reference", BACKEND):
        with use_backend(backend):
            outputs = transition_inputs(*inputs("state"))
        assert outputs.v_t is None and outputs.x_pm is None


def test_strided_input_is_read_in_place():
    packed = noise(4, 8, 3, 8, device=DEVICE)
    x, z = packed[1:, :4], packed[1:, 4:]
    _, _, *rows = inputs("all", (3, 4, 3, 8))
    with use_backend(BACKEND):
        strided = function("all")(x, z, *rows)
        dense = function("all")(x.contiguous(), z.contiguous(), *rows)
        gaps = function("all")(x.contiguous(memory_format=torch.channels_last), z.mT.clone().mT,
                               *(row.repeat_interleave(2)[::2] for row in rows))  # fmt: skip
    for a, b, c in zip(strided, dense, gaps, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_only_the_gradients_that_are_needed():
    """Each argument alone has the gradient that it has beside the others."""
    args = inputs("all")
    with use_backend(BACKEND):
        leaves = [x.clone().requires_grad_() for x in args]
        sum(o.square().sum() for o in function("all")(*leaves)).backward()
        for i, leaf in enumerate(leaves):
            alone = [x.clone().requires_grad_(i == j) for j, x in enumerate(args)]
            sum(o.square().sum() for o in function("all")(*alone)).backward()
            assert torch.equal(alone[i].grad, leaf.grad)
        (only_x_t,) = torch.autograd.grad(function("all")(*leaves)[0].sum(), leaves[0])
        assert torch.equal(only_x_t, per_sample(args[2], only_x_t).expand_as(only_x_t))


def test_a_tangent_of_one_argument_alone():
    args = inputs("all")
    for i in (0, 2, 7):

        def alone(value, i=i):
            return function("all")(*args[:i], value, *args[i + 1 :])

        tangents = []
        for backend in ("reference", BACKEND):
            with use_backend(backend):
                tangents.append(torch.func.jvp(alone, (args[i],), (args[i] + 1,))[1])
        for a, b in zip(*tangents, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_reruns_are_equal_and_derivatives_adjoint(form):
    args = inputs(form, (3, 4, 17, 20))
    assert_same_every_run(function(form), args)
    assert_adjoint(function(form), args)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    assert_gradcheck(function(form), inputs(form, (2, 1, 2, 2), 1))


def test_float64_runs_on_the_reference():
    args = [a.double() for a in inputs("all")]
    with use_backend(BACKEND):
        ours = function("all")(*args)
    for a, b in zip(ours, eager(*args, form="all", trailing=2), strict=True):
        assert a.dtype == torch.float64 and torch.equal(a, b)


def test_nan_and_infinity():
    args = inputs("all")
    args[0][1, 0, 0, 0], args[1][2, 1, 2, 3] = float("nan"), float("inf")
    args[2][0], args[5][1] = float("-inf"), float("nan")
    assert_nonfinite_like_reference(function("all"), args)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_once_for_all_lengths(form):
    """Sizes that are equal by chance in the first call would be taken to be equal always."""
    sizes = ((7, 4, 10, 5), 3), ((5, 4, 3, 8), 2), ((6, 4, 7, 9), 4)
    assert_compiles_once(function(form), [inputs(form, *size) for size in sizes])


def test_opcheck():
    args = inputs("all", (2, 3, 2, 2), 1)
    leaves = [a.detach().requires_grad_() for a in args]
    with use_backend(BACKEND):
        torch.library.opcheck(op.forward_op.torch_op, tuple(leaves))
        torch.library.opcheck(op.forward_op.torch_op, (*leaves[:4], None, None, *leaves[6:]))
        outputs = op.forward_op(*args)
        torch.library.opcheck(op.backward_op.torch_op, (*outputs, *args, True, False, True))
        torch.library.opcheck(op.jvp_op.torch_op, (*args, *args))


@sweep(
    15,
    form=st.sampled_from(sorted(FORMS)),
    B=st.integers(6, 9),
    shape=st.lists(st.integers(3, 9), min_size=1, max_size=2),
    skipped=st.sampled_from((0, 2, None)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(form, B, shape, skipped, dtype):
    """Samples enough that no sum cancels by chance, in which eager may be lucky."""
    check(form, (B, *shape), 0 if skipped is None else B - skipped, dtype)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(z=slice(1, None)), r"z must be \(3, 4, 5, 8\) for x"),
        (dict(alpha=slice(1, None)), r"alpha must be \(3,\), one number a sample; got \(2,\)"),
        (dict(d_sigma=None), "both d_alpha and d_sigma"),
        (dict(sigma_pm=slice(1, None)), r"sigma_pm must be \(4,\)"),
        (dict(alpha_pm=slice(1, None)), "alpha_pm must have 2 numbers"),
        (dict(d_alpha=slice(1, None), d_sigma=slice(1, None)), "two for each of d_alpha"),
        (dict(x=(0, 0, 0), z=(0, 0, 0)), "two dimensions or more"),
    ],
)
def test_refusals(change, message):
    names = ("x", "z", "alpha", "sigma", "d_alpha", "d_sigma", "alpha_pm", "sigma_pm")
    args = dict(zip(names, inputs("all"), strict=True))
    for name, index in change.items():
        args[name] = None if index is None else args[name][index]
    with pytest.raises(ValueError, match=message):
        transition_inputs(**args)
