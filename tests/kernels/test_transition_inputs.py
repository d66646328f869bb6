import pytest
import torch
from contract import Contract, Problem, over, with_gradients
from parity import BACKEND, DEVICE, DTYPES, noise
from sweep import st

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


def problem(form, shape=(3, 4, 5, 8), trailing=2, dtype=torch.float32, cond_dtype=None):
    """Latents of `dtype`, coefficients of `cond_dtype`; so many trailing samples."""

    def vector(n, seed):
        return noise(n, seed=seed, dtype=cond_dtype or dtype, device=DEVICE)

    inputs = [noise(*shape, seed=i, dtype=dtype, device=DEVICE) for i in range(2)]
    inputs += [vector(shape[0], 10), vector(shape[0], 11)]
    for sides in FORMS[form]:
        inputs += [vector(sides * trailing, 20 + sides), vector(sides * trailing, 30 + sides)]

    def twin(*args):
        return eager(*args, form=form, trailing=trailing)

    return Problem(function(form), twin, inputs)


class TestTransitionInputs(Contract):
    problem = staticmethod(problem)
    parity = [
        *over(form=FORMS, dtype=[*DTYPES], shape=(3, 4, 16, 18)),
        *over(form=FORMS, dtype=[*DTYPES], shape=(2, 3, 5, 7), trailing=1),
        *over(form=FORMS, dtype=[*DTYPES], shape=(2, 4, 6), cond_dtype=torch.float32),
        *over(form="all", shape=[(1, 1)], trailing=1),
        *over(form="all", shape=[(1, 1, 1, 1), (2, 2, 33, 17)], trailing=0),
        *over(form="all", shape=[(4, 3)], trailing=4),
    ]
    empty = [
        *over(form=FORMS, shape=(0, 4, 2, 2), trailing=0),
        *over(form=FORMS, shape=(2, 4, 0, 3), trailing=1),
    ]
    on_cpu = over(form=FORMS, dtype=[*DTYPES], shape=(3, 4, 5, 6), cond_dtype=torch.float32)
    layout = over(form=FORMS, shape=(3, 4, 3, 8))
    partial = over(form=FORMS)
    repeated = over(form=FORMS, shape=(3, 4, 17, 20))
    small = over(form=FORMS, shape=(2, 1, 2, 2), trailing=1)
    nonfinite = over(form="all")
    float64 = over(form=FORMS)
    compiled = [  # sizes that are equal by chance in the first call are taken to be equal always
        [
            dict(form=form, shape=shape, trailing=n)
            for shape, n in (((7, 4, 10, 5), 3), ((5, 4, 3, 8), 2), ((6, 4, 7, 9), 4))
        ]
        for form in FORMS
    ]
    draws = dict(
        form=st.sampled_from(sorted(FORMS)),
        B=st.integers(6, 9),  # so many that no sum cancels by chance, in which eager may be lucky
        shape=st.lists(st.integers(3, 9), min_size=1, max_size=2),
        skipped=st.sampled_from((0, 2, None)),
        dtype=st.sampled_from(DTYPES),
    )

    def draw(self, data):
        case = super().draw(data)
        B, skipped = case.pop("B"), case.pop("skipped")
        trailing = 0 if skipped is None else B - skipped
        return case | dict(shape=(B, *case["shape"]), trailing=trailing)

    def poison(self, inputs):
        inputs[0][1, 0, 0, 0], inputs[1][2, 1, 2, 3] = float("nan"), float("inf")
        inputs[2][0], inputs[5][1] = float("-inf"), float("nan")

    def operators(self):
        args = problem("all", (2, 3, 2, 2), 1).inputs
        yield op.forward_op, with_gradients(*args)
        yield op.forward_op, with_gradients(*args[:4], None, None, *args[6:])
        yield op.backward_op, (*op.forward_op(*args), *args, True, False, True)
        yield op.forward_op.jvp, (*args, *args)


def test_what_was_not_asked_for_is_none():
    for backend in ("reference", BACKEND):
        with use_backend(backend):
            outputs = transition_inputs(*problem("state").inputs)
        assert outputs.v_t is None and outputs.x_pm is None


def test_channels_of_a_wider_tensor_are_read_in_place():
    packed = noise(4, 8, 3, 8, device=DEVICE)
    x, z = packed[1:, :4], packed[1:, 4:]
    _, _, *rows = problem("all", (3, 4, 3, 8)).inputs
    with use_backend(BACKEND):
        strided = function("all")(x, z, *rows)
        dense = function("all")(x.contiguous(), z.contiguous(), *rows)
        gaps = function("all")(x.contiguous(memory_format=torch.channels_last), z.mT.clone().mT,
                               *(row.repeat_interleave(2)[::2] for row in rows))  # fmt: skip
    for a, b, c in zip(strided, dense, gaps, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_the_gradient_of_one_output():
    leaf, z, alpha, *rest = problem("all").inputs
    leaf.requires_grad_()
    with use_backend(BACKEND):
        (only_x_t,) = torch.autograd.grad(function("all")(leaf, z, alpha, *rest)[0].sum(), leaf)
    assert torch.equal(only_x_t, per_sample(alpha, only_x_t).expand_as(only_x_t))


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
    args = dict(zip(names, problem("all").inputs, strict=True))
    for name, index in change.items():
        args[name] = None if index is None else args[name][index]
    with pytest.raises(ValueError, match=message):
        transition_inputs(**args)
