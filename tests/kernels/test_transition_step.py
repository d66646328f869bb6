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
from tim_kernels.transition_step import op
from tim_kernels.transition_step.op import transition_step

FORMS = {  # is it guided, is it stochastic
    "plain": (False, False),
    "guided": (True, False),
    "noisy": (False, True),
    "both": (True, True),
}


def arguments(form, args):
    """Positional tensors (x, F_c, F_u?, n?, a, b, g?, c?) as those of `transition_step`."""
    is_guided, is_noisy = FORMS[form]
    args = list(args)
    x, F_cond = args.pop(0), args.pop(0)
    F_uncond = args.pop(0) if is_guided else None
    noise = args.pop(0) if is_noisy else None
    a, b = args.pop(0), args.pop(0)
    guidance = args.pop(0) if is_guided else 1.0
    return x, F_cond, (a, b, args.pop(0) if is_noisy else None), F_uncond, guidance, noise


def function(form):
    return lambda *args: transition_step(*arguments(form, args))


def eager(form):
    def call(*args):
        x, F, (a, b, c), F_uncond, guidance, noise = arguments(form, args)
        dtype = x.dtype
        F = F.to(dtype)
        if F_uncond is not None:
            F = F_uncond.to(dtype) + per_sample(guidance, x) * (F - F_uncond.to(dtype))
        out = per_sample(a, x) * x + per_sample(b, x) * F
        out = out if noise is None else out + per_sample(c, x) * noise
        return out.to(dtype)

    return call


def inputs(form, shape=(3, 4, 5, 8), dtype=torch.float32, network=None, row_dtype=None):
    def draw(seed, *size, dtype):
        return noise(*size, seed=seed, dtype=dtype, device=DEVICE)

    is_guided, is_noisy = FORMS[form]
    args = [draw(0, *shape, dtype=dtype), draw(1, *shape, dtype=network or dtype)]
    args += [draw(2, *shape, dtype=network or dtype)] * is_guided
    args += [draw(3, *shape, dtype=dtype)] * is_noisy
    rows = 2 + is_guided + is_noisy
    return args + [draw(10 + i, shape[0], dtype=row_dtype or dtype) for i in range(rows)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_parity(form, dtype):
    for shape in ((3, 4, 16, 18), (2, 3, 5, 7)):
        assert_parity(function(form), eager(form), inputs(form, shape, dtype))
    mixed = inputs(form, (2, 4, 24), torch.float32, network=dtype)
    assert_parity(function(form), eager(form), mixed)


@pytest.mark.parametrize("network", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_float64_state(form, network):
    """Derivatives too are those of float64, rounded once where the network's dtype is narrower."""
    args = inputs(form, (2, 3, 5, 7), torch.float64, network)
    results = []
    for backend in ("reference", BACKEND):
        leaves = [x.clone().requires_grad_() for x in args]
        with use_backend(backend):
            out = function(form)(*leaves)
            gradients = torch.autograd.grad(out.square().sum(), leaves)
            _, tangent = torch.func.jvp(function(form), tuple(args), tuple(a + 1 for a in args))
        results.append((out.detach(), *gradients, tangent))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-12 if a.dtype == torch.float64 else None
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 1, 1, 1), (2, 2, 33, 17)])
def test_sizes(shape):
    assert_parity(function("both"), eager("both"), inputs("both", shape))


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 4, 0, 3)])
def test_nothing_to_do(shape):
    leaves = [x.requires_grad_() for x in inputs("both", shape)]
    with use_backend(BACKEND):
        out = function("both")(*leaves)
        out.sum().backward()
    assert out.shape == shape and not any(leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("backend", ["reference", BACKEND])
def test_guidance_as_a_number(backend):
    x, F_cond, F_uncond, a, b, guidance = inputs("guided", dtype=torch.float64)
    with use_backend(backend):
        number = transition_step(x, F_cond, (a, b, None), F_uncond, 1.1)
        tensor = transition_step(x, F_cond, (a, b, None), F_uncond, torch.full_like(guidance, 1.1))
        plain = transition_step(x, F_cond, (a, b, None), guidance=1.1)
        assert torch.equal(plain, transition_step(x, F_cond, (a, b, None)))
    assert torch.equal(number, tensor)


def test_strided_input_is_read_in_place():
    """The two halves of one doubled batch, and channels of a wider tensor."""
    x, F_cond, F_uncond, *rows = inputs("guided", (2, 4, 3, 8))
    halves = torch.cat((F_cond, F_uncond)).chunk(2)
    wide = torch.cat((x, x), 1)[:, :4]
    gaps = x.contiguous(memory_format=torch.channels_last)
    with use_backend(BACKEND):
        dense = function("guided")(x, F_cond, F_uncond, *rows)
        assert torch.equal(dense, function("guided")(wide, *halves, *rows))
        assert torch.equal(dense, function("guided")(gaps, *halves, *rows))


@pytest.mark.parametrize("form", FORMS)
def test_only_the_gradients_that_are_needed(form):
    args = inputs(form, (2, 3, 4))
    with use_backend(BACKEND):
        leaves = [x.clone().requires_grad_() for x in args]
        function(form)(*leaves).square().sum().backward()
        for i, leaf in enumerate(leaves):
            alone = [x.clone().requires_grad_(i == j) for j, x in enumerate(args)]
            function(form)(*alone).square().sum().backward()
            assert torch.equal(alone[i].grad, leaf.grad)


@pytest.mark.parametrize("form", FORMS)
def test_a_tangent_of_one_argument_alone(form):
    args = inputs(form, (2, 3, 4))
    for i, argument in enumerate(args):

        def alone(value, i=i):
            return function(form)(*args[:i], value, *args[i + 1 :])

        tangents = []
        for backend in ("reference", BACKEND):
            with use_backend(backend):
                tangents.append(torch.func.jvp(alone, (argument,), (argument + 1,))[1])
        torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("form", FORMS)
def test_reruns_are_equal_and_derivatives_adjoint(form):
    args = inputs(form, (3, 4, 17, 20))
    assert_same_every_run(function(form), args)
    assert_adjoint(function(form), args)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    assert_gradcheck(function(form), inputs(form, (2, 1, 2, 2)))


def test_nan_and_infinity():
    args = inputs("both")
    args[0][1, 0, 0, 0], args[2][2, 1, 2, 3] = float("nan"), float("inf")
    args[4][0], args[6][1] = float("-inf"), float("nan")
    assert_nonfinite_like_reference(function("both"), args)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_once_for_all_lengths(form):
    calls = [inputs(form, shape) for shape in ((7, 4, 10, 5), (5, 4, 3, 8), (6, 4, 7, 9))]
    assert_compiles_once(function(form), calls)


def test_opcheck():
    x, F_cond, F_uncond, noise, a, b, guidance, c = inputs("both", (2, 3, 2))
    args = x, F_cond, F_uncond, noise, guidance, a, b, c
    with use_backend(BACKEND):
        leaves = tuple(arg.detach().requires_grad_() for arg in args)
        torch.library.opcheck(op.forward_op.torch_op, leaves)
        plain = (*leaves[:2], None, None, None, *leaves[5:7], None)
        torch.library.opcheck(op.forward_op.torch_op, plain)
        torch.library.opcheck(op.backward_op.torch_op, (x, *args, [True, False, True, True, True]))
        torch.library.opcheck(op.jvp_op.torch_op, (*args, *args))


@sweep(
    15,
    form=st.sampled_from(sorted(FORMS)),
    B=st.integers(6, 9),
    shape=st.lists(st.integers(3, 9), min_size=1, max_size=2),
    dtype=st.sampled_from(DTYPES),
    network=st.sampled_from(DTYPES),
)
def test_any_shape(form, B, shape, dtype, network):
    """Samples enough that no sum cancels by chance, in which eager may be lucky."""
    assert_parity(function(form), eager(form), inputs(form, (B, *shape), dtype, network, dtype))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(3)), "two dimensions or more"),
        (dict(F_cond=torch.zeros(3, 4, 5, 7)), r"F_cond must be \(3, 4, 5, 8\) for x"),
        (dict(noise=torch.zeros(3, 4, 5)), "noise must be"),
        (dict(coefficients=(torch.ones(2), torch.ones(3), None), noise=None), r"a must be \(3,\)"),
        (dict(coefficients=(torch.ones(3), torch.ones(3), None)), "noise needs the third"),
        (dict(guidance=torch.ones(3, 1)), r"guidance must be \(3,\)"),
        (dict(F_uncond=torch.zeros(3, 4, 5, 8, dtype=torch.long)), "floating-point"),
    ],
)
def test_refusals(change, message):
    names = ("x", "F_cond", "coefficients", "F_uncond", "guidance", "noise")
    args = dict(zip(names, arguments("both", inputs("both")), strict=True))
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        transition_step(**args | change)
