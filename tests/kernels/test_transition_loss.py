import pytest
import torch
import torch.nn.functional as F
from contract import Contract, Problem, over
from parity import (
    BACKEND,
    DEVICE,
    DTYPES,
    assert_compiles_once,
    assert_nonfinite_like_reference,
    assert_parity,
    noise,
)
from sweep import st

from tim_kernels.coefficients import per_sample
from tim_kernels.dispatch.backend import use_backend
from tim_kernels.launch import plans
from tim_kernels.transition_loss import op
from tim_kernels.transition_loss.op import transition_loss

FORMS = {  # networks a trailing sample, whether the target is enhanced
    "diffusion": (0, False),
    "derivative": (1, False),
    "difference": (2, False),
    "enhanced": (2, True),
}
EPSILON = 0.005


def arguments(form, shape=(3, 4, 5, 8), trailing=2, dtype=torch.float32, latents=None):
    """The prediction, and the other arguments of `transition_loss` by name."""

    def draw(seed, *size, dtype=latents or dtype):
        return noise(*size, seed=seed, dtype=dtype, device=DEVICE)

    networks, is_enhanced = FORMS[form]
    B, *inner = shape
    rest = dict(x=draw(1, *shape), z=draw(2, *shape))
    a = [draw(3 + i, B, dtype=torch.float32) for i in range(5)]
    if networks == 2:
        a[2] *= 2 * EPSILON  # what the difference is divided by: no sample outweighs the others
    rest["coefficients"] = tuple(a)
    if networks:
        rest["dF"] = draw(8, networks * trailing, *inner, dtype=dtype)
    if networks == 2:
        rest["epsilon"] = EPSILON
    if is_enhanced:
        rest |= dict(F_cond=draw(9, *shape, dtype=dtype), F_uncond=draw(10, *shape, dtype=dtype))
    return draw(0, *shape, dtype=dtype), rest


def fused(rest):
    return lambda prediction: transition_loss(prediction, **rest)


def eager(rest):
    """The same in plain PyTorch, as the objective had it."""

    def call(prediction):
        x, z = rest["x"].float(), rest["z"].float()
        a = [per_sample(c, x) for c in rest["coefficients"]]
        D = torch.zeros_like(x)
        if "dF" in rest:
            dF = rest["dF"].float()
            if "epsilon" in rest:
                later, earlier = dF.chunk(2)
                dF = (later - earlier) / (2 * EPSILON)
            D[len(x) - len(dF) :] = dF
        target = a[0] * x + a[1] * z + a[2] * D
        if "F_cond" in rest:
            target = target + a[3] * rest["F_cond"].float() + a[4] * rest["F_uncond"].float()
        prediction = prediction.float()
        squared = (prediction - target).square().flatten(1).mean(1)
        cosine = 1 - F.cosine_similarity(prediction, target, dim=1)
        return squared, cosine.unsqueeze(-1).flatten(1).mean(1)

    return call


def problem(*args, **kwargs):
    """In which only the prediction is differentiated."""
    prediction, rest = arguments(*args, **kwargs)
    return Problem(fused(rest), eager(rest), [prediction])


class TestTransitionLoss(Contract):
    problem = staticmethod(problem)
    parity = [
        *over(form=FORMS, dtype=[*DTYPES]),
        *over(form=FORMS, dtype=[*DTYPES], shape=(2, 3, 5, 7), trailing=1),
        *over(form=FORMS, dtype=[*DTYPES], shape=(2, 4, 24), latents=torch.float32),
        *over(form="enhanced", shape=[(2, C, 6, 12) for C in (1, 2, 4, 16, 32, 33, 64, 96)],
              trailing=1),
        dict(form="enhanced", shape=(1, 1), trailing=1),
        dict(form="enhanced", shape=(1, 4, 1), trailing=0),
        dict(form="enhanced", shape=(3, 4, 50, 50), trailing=3),
    ]  # fmt: skip
    empty = [  # no sample, or the mean of nothing
        *over(form=FORMS, shape=(0, 4, 2, 2), trailing=0),
        *over(form=FORMS, shape=(2, 4, 0, 3), trailing=1),
    ]
    on_cpu = over(form=FORMS, dtype=[*DTYPES], shape=(3, 4, 5, 6), latents=torch.float32)
    repeated = over(form=FORMS, shape=(3, 4, 17, 32))
    small = over(form=FORMS, shape=(2, 3, 2, 2), trailing=1)
    compiled = [
        [
            dict(form=form, shape=shape, trailing=n)
            for shape, n in (((7, 4, 10, 5), 3), ((5, 4, 3, 8), 2), ((6, 4, 7, 9), 5))
        ]
        for form in FORMS
    ]
    draws = dict(
        form=st.sampled_from(sorted(FORMS)),
        C=st.integers(2, 40),
        B=st.integers(6, 9),  # so many that no sum cancels by chance, in which eager may be lucky
        shape=st.lists(st.integers(2, 9), min_size=1, max_size=2),
        dtype=st.sampled_from(DTYPES),
    )

    def draw(self, data):
        case = super().draw(data)
        B, C = case.pop("B"), case.pop("C")
        trailing = data.draw(st.integers(0, B))
        return case | dict(shape=(B, C, *case["shape"]), trailing=trailing)

    def test_compiles_once_for_all_lengths(self, compiled):
        """Every tensor's lengths change, not the prediction's alone."""
        calls = [arguments(**case) for case in compiled]
        rest = calls[0][1]
        keys = [name for name in rest if name not in ("epsilon", "coefficients")]

        def function(prediction, *tensors):
            coefficients, others = tensors[:5], dict(zip(keys, tensors[5:], strict=True))
            epsilon = EPSILON if "epsilon" in rest else None
            squared, cosine = transition_loss(
                prediction, coefficients=coefficients, epsilon=epsilon, **others
            )
            return squared, cosine + 0 * sum(t.sum() for t in tensors)  # each has a gradient

        assert_compiles_once(
            function, [[p, *r["coefficients"], *(r[key] for key in keys)] for p, r in calls]
        )

    def operators(self):
        prediction, rest = arguments("enhanced", (2, 3, 2, 2), 1)
        leaf = prediction.clone().requires_grad_()
        others = rest["x"], rest["z"], *rest["coefficients"]
        networks = [rest[name] for name in ("dF", "epsilon", "F_cond", "F_uncond")]
        yield op.forward_op, (leaf, *others, *networks)
        yield op.forward_op, (leaf, *others, None, None, None, None)
        gradients = noise(2, 2, device=DEVICE).unbind(0)
        yield op.backward_op, (*gradients, prediction, *others, *networks)
        yield op.forward_op.jvp, (prediction, *others, *networks, prediction)


def test_a_program_of_several_tiles(monkeypatch):
    for module in ("latents", "dense"):
        monkeypatch.setattr(f"tim_kernels.launch.{module}.multiprocessors", lambda device: 1)
    with plans.forgotten_around():
        assert_parity(*problem("difference", (5, 32, 20, 20), 3))
        assert_parity(*problem("difference", (5, 3, 30, 15), 3))


def test_channels_of_a_wider_tensor_are_read_in_place():
    prediction, rest = arguments("difference", (3, 4, 3, 8), 2)
    packed = torch.cat((prediction, rest["x"], rest["z"]), 1)
    views = dict(zip(("x", "z"), packed.chunk(3, 1)[1:], strict=True))
    with use_backend(BACKEND):
        dense = transition_loss(prediction, **rest)
        strided = transition_loss(packed[:, :4], **rest | views)
        gaps = transition_loss(
            prediction.contiguous(memory_format=torch.channels_last),
            **rest | dict(dF=rest["dF"].mT.clone().mT),
        )
    for a, b, c in zip(dense, strided, gaps, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_the_target_is_a_constant():
    prediction, rest = arguments("difference")
    for backend in ("reference", BACKEND):
        leaves = {name: rest[name].clone().requires_grad_() for name in ("x", "z", "dF")}
        with use_backend(backend):
            squared, cosine = transition_loss(prediction.requires_grad_(), **rest | leaves)
            (squared + cosine).sum().backward()
            _, tangents = torch.func.jvp(
                lambda x: transition_loss(prediction.detach(), **rest | dict(x=x)),
                (rest["x"],),
                (rest["z"],),
            )
        assert all(leaf.grad is None for leaf in leaves.values())
        assert not any(tangent.any() for tangent in tangents)


def test_one_term_alone():
    """The gradient of each output is its own share of both."""
    prediction, rest = arguments("enhanced")
    with use_backend(BACKEND):
        leaf = prediction.requires_grad_()
        terms = transition_loss(leaf, **rest)
        both, *each = (
            torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0]
            for loss in (terms[0] + terms[1], *terms)
        )
    torch.testing.assert_close(each[0] + each[1], both)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-7])
def test_small_norms_are_raised_to_eps(scale):
    """Against PyTorch's own cosine; its gradient is right on both sides of eps, not just above."""
    prediction, rest = arguments("diffusion")
    prediction = prediction * scale
    rest = rest | dict(coefficients=tuple(c.abs() + 1 for c in rest["coefficients"]))
    assert_parity(fused(rest), fused(rest), [prediction])
    with use_backend(BACKEND):
        torch.testing.assert_close(fused(rest)(prediction), eager(rest)(prediction))


def test_nan_and_infinity():
    for name in ("prediction", "x", "dF", "F_cond"):
        prediction, rest = arguments("enhanced", (4, 4, 3, 5))
        tensor = prediction if name == "prediction" else rest[name]
        tensor[1, 2, 1, 3], tensor[2, 0, 0, 0] = float("nan"), float("inf")
        assert_nonfinite_like_reference(fused(rest), [prediction])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: dict(x=a["x"][1:]), r"x must be \(3, 4, 5, 8\) for prediction"),
        (lambda a: dict(coefficients=[c[1:] for c in a["coefficients"]]), r"coefficient of x must"),
        (lambda a: dict(F_cond=None), "both F_cond and F_uncond"),
        (lambda a: dict(epsilon=0.0), "epsilon must be positive"),
        (lambda a: dict(dF=a["dF"][1:]), "dF must have 2 of each"),
        (lambda a: dict(dF=a["dF"][:, 1:]), r"dF must be \(4, 4, 5, 8\)"),
        (lambda a: dict(z=a["z"].long()), "floating-point"),
    ],
)
def test_refusals(change, message):
    prediction, rest = arguments("enhanced")
    with pytest.raises(ValueError, match=message):
        transition_loss(prediction, **rest | change(rest))
