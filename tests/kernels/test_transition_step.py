import pytest
import torch
from contract import Contract, Problem, over, with_gradients
from parity import BACKEND, DEVICE, DTYPES, noise
from sweep import st

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


def problem(form, shape=(3, 4, 5, 8), dtype=torch.float32, network=None):
    """State and coefficients of `dtype`, predictions of the dtype `network`."""

    def draw(seed, *size, dtype=dtype):
        return noise(*size, seed=seed, dtype=dtype, device=DEVICE)

    is_guided, is_noisy = FORMS[form]
    inputs = [draw(0, *shape), draw(1, *shape, dtype=network or dtype)]
    inputs += [draw(2, *shape, dtype=network or dtype)] * is_guided
    inputs += [draw(3, *shape)] * is_noisy
    inputs += [draw(10 + i, shape[0]) for i in range(2 + is_guided + is_noisy)]
    return Problem(function(form), eager(form), inputs)


class TestTransitionStep(Contract):
    problem = staticmethod(problem)
    parity = [
        *over(form=FORMS, dtype=[*DTYPES], shape=[(3, 4, 16, 18), (2, 3, 5, 7)]),
        *over(form=FORMS, network=[*DTYPES], shape=(2, 4, 24)),
        *over(form="both", shape=[(1, 1), (4, 1), (1, 1, 1, 1), (2, 2, 33, 17)]),
    ]
    empty = over(form=FORMS, shape=[(0, 4, 2, 2), (2, 4, 0, 3)])
    on_cpu = over(form=FORMS, network=[*DTYPES], shape=(2, 4, 24))
    layout = over(form=FORMS, shape=(2, 4, 3, 8))
    partial = over(form=FORMS, shape=(2, 3, 4))
    repeated = over(form=FORMS, shape=(3, 4, 17, 20))
    small = over(form=FORMS, shape=(2, 1, 2, 2))
    nonfinite = over(form="both")
    compiled = [
        over(form=form, shape=[(7, 4, 10, 5), (5, 4, 3, 8), (6, 4, 7, 9)]) for form in FORMS
    ]
    draws = dict(
        form=st.sampled_from(sorted(FORMS)),
        B=st.integers(6, 9),  # so many that no sum cancels by chance, in which eager may be lucky
        shape=st.lists(st.integers(3, 9), min_size=1, max_size=2),
        dtype=st.sampled_from(DTYPES),
        network=st.sampled_from(DTYPES),
    )

    def draw(self, data):
        case = super().draw(data)
        B = case.pop("B")
        return case | dict(shape=(B, *case["shape"]))

    def poison(self, inputs):
        inputs[0][1, 0, 0, 0], inputs[2][2, 1, 2, 3] = float("nan"), float("inf")
        inputs[4][0], inputs[6][1] = float("-inf"), float("nan")

    def operators(self):
        x, F_cond, F_uncond, noise, a, b, guidance, c = problem("both", (2, 3, 2)).inputs
        args = x, F_cond, F_uncond, noise, guidance, a, b, c
        yield op.forward_op, with_gradients(*args)
        yield op.forward_op, with_gradients(x, F_cond, None, None, None, a, b, None)
        yield op.backward_op, (x, *args, [True, False, True, True, True])
        yield op.forward_op.jvp, (*args, *args)


@pytest.mark.parametrize("network", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_float64_state(form, network):
    """Derivatives too are those of float64, rounded once where the network's dtype is narrower."""
    args = problem(form, (2, 3, 5, 7), torch.float64, network).inputs
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


@pytest.mark.parametrize("backend", ["reference", BACKEND])
def test_guidance_as_a_number(backend):
    x, F_cond, F_uncond, a, b, guidance = problem("guided", dtype=torch.float64).inputs
    with use_backend(backend):
        number = transition_step(x, F_cond, (a, b, None), F_uncond, 1.1)
        tensor = transition_step(x, F_cond, (a, b, None), F_uncond, torch.full_like(guidance, 1.1))
        plain = transition_step(x, F_cond, (a, b, None), guidance=1.1)
        assert torch.equal(plain, transition_step(x, F_cond, (a, b, None)))
    assert torch.equal(number, tensor)


def test_halves_and_channels_last_are_read_in_place():
    """The two halves of one doubled batch, and channels of a wider tensor."""
    x, F_cond, F_uncond, *rows = problem("guided", (2, 4, 3, 8)).inputs
    halves = torch.cat((F_cond, F_uncond)).chunk(2)
    wide = torch.cat((x, x), 1)[:, :4]
    gaps = x.contiguous(memory_format=torch.channels_last)
    with use_backend(BACKEND):
        dense = function("guided")(x, F_cond, F_uncond, *rows)
        assert torch.equal(dense, function("guided")(wide, *halves, *rows))
        assert torch.equal(dense, function("guided")(gaps, *halves, *rows))


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
    args = dict(zip(names, arguments("both", problem("both").inputs), strict=True))
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        transition_step(**args | change)
