"""torch.func.vmap over every operation, alone and with derivatives, is a loop over its slices."""

import pytest
import torch
from parity import BACKEND, DEVICE, as_tuple, noise
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import tim_kernels as ops
from tim_kernels import use_backend

CU = torch.tensor([0, 1, 4], dtype=torch.int32, device=DEVICE)
SEGMENTS = ops.Segments(CU, 3)
X, ROW, LATENT = (2, 3, 4), (2, 4), (2, 3, 2)


def norm_and_rope(q, weight, shift):
    return ops.qk_norm_rope(q, None, weight, grid=(1, 2), q_shift=shift)


def packed_norm_and_rope(qkv, weight, shift):
    return torch.stack(ops.qkv_norm_rope(qkv, weight, None, weight, q_shift=shift, grid=(1, 2)))


def embedding(t, r, w1, w2):
    mlp = ops.TimeMLP(w1, w1[:, 0], w2, w2[:, 0])
    return torch.stack(ops.time_pair_embedding(t, r, mlp, condition="t,r,t-r"))


def inputs(x, z, a, b):
    return torch.cat(ops.transition_inputs(x, z, a, b, b[1:], a[1:], b, a))


def loss(prediction, x, dF, a):
    x, a = x.detach(), a.detach()
    return torch.stack(ops.transition_loss(prediction, x, x + 1, (a, a, a, a, a), dF.detach()))


def step(x, F, F_uncond, a):
    return ops.transition_step(x, F, (a, a + 1, None), F_uncond, a)


def residual_and_norm(x, branch, gate, shift):
    return torch.stack(ops.gated_residual_ada_layer_norm(x, branch, gate, shift, gate))


def packed_norm(x, shift):
    return ops.ada_layer_norm(x, shift, shift, segments=SEGMENTS)


def packed_rope(q, shift):
    return ops.qk_norm_rope(q, None, grid=(2, 2), q_shift=shift, segments=SEGMENTS)


def causal(q, k):
    return ops.attention(q, k, k, scale=0.3, is_causal=True)


CASES = {  # an operation, and the shapes of what it is differentiable in
    "ada_layer_norm": (ops.ada_layer_norm, X, ROW, (1, 4)),
    "ada_layer_norm, packed": (packed_norm, (4, 4), ROW),
    "gated_residual": (ops.gated_residual, X, X, ROW),
    "gated_residual_ada_layer_norm": (residual_and_norm, X, X, ROW, ROW),
    "attention": (ops.attention, (1, 3, 1, 8), (1, 2, 1, 8), (1, 2, 1, 8)),
    "attention, packed": (lambda q, k: ops.attention(q, k, k, SEGMENTS), (4, 1, 8), (4, 1, 8)),
    "attention, causal": (causal, (1, 3, 2, 8), (1, 3, 1, 8)),
    "qk_norm_rope": (norm_and_rope, (2, 2, 1, 4), (4,), (2, 4)),
    "qk_norm_rope, packed": (packed_rope, (4, 2, 4), (2, 8)),
    "qkv_norm_rope": (packed_norm_and_rope, (1, 2, 3, 1, 4), (4,), (1, 4)),
    "swiglu": (ops.swiglu, X, X),
    "swiglu, one tensor": (ops.swiglu, X),
    "time_pair_embedding": (embedding, (2,), (2,), (3, 256), (5, 3)),
    "transition_inputs": (inputs, LATENT, LATENT, (2,), (2,)),
    "transition_loss": (loss, LATENT, LATENT, (1, 3, 2), (2,)),
    "transition_step": (step, LATENT, LATENT, LATENT, (2,)),
}


def loop(function, in_dims=0):
    """What vmap is by definition."""

    def looped(*args):
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)
        size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
        calls = []
        for i in range(size):
            pairs = zip(args, dims, strict=True)
            calls.append(
                as_tuple(function(*(x if d is None else x.select(d, i) for x, d in pairs)))
            )
        return tuple(map(torch.stack, zip(*calls, strict=True)))

    return looped


def gradients(function):
    def square(*args):
        return function(*args).square().sum()

    return lambda *args: grad(square, argnums=tuple(range(len(args))))(*args)


def tangents(function):
    return lambda *args: jvp(function, args, tuple(x.cos() for x in args))


TRANSFORMS = {  # how many dimensions are mapped, and the transform, where `m` maps one of them
    "alone": (1, lambda f, m: m(f)),
    "nested": (2, lambda f, m: m(m(f))),
    "of gradients": (1, lambda f, m: m(gradients(f))),
    "of tangents": (1, lambda f, m: m(tangents(f))),
    "within gradients": (1, lambda f, m: gradients(lambda *args: as_tuple(m(f)(*args))[0])),
    "within tangents": (1, lambda f, m: tangents(lambda *args: as_tuple(m(f)(*args))[0])),
    "of tangents in a map": (2, lambda f, m: m(tangents(lambda *args: as_tuple(m(f)(*args))[0]))),
}


OFTEN = "alone", "of gradients", "of tangents", "of tangents in a map"


def nightly(value):
    return pytest.param(value, marks=pytest.mark.nightly)


def arguments(name: str, *mapped: int) -> list:
    return [
        noise(*mapped, *shape, seed=i, device=DEVICE) for i, shape in enumerate(CASES[name][1:])
    ]


def assert_same(ours, expected):
    for a, b in zip(torch.utils._pytree.tree_leaves(ours), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", BACKEND])
@pytest.mark.parametrize("transform", [*OFTEN, *map(nightly, sorted(TRANSFORMS.keys() - OFTEN))])
@pytest.mark.parametrize("name", CASES)
def test_is_a_loop(name, transform, backend):
    depth, transformed = TRANSFORMS[transform]
    function, args = CASES[name][0], arguments(name, *(2,) * depth)
    with use_backend("reference"):
        expected = transformed(function, loop)(*(x.double() for x in args))
    with use_backend(backend):
        ours = transformed(function, vmap)(*args)
    assert_same(ours, torch.utils._pytree.tree_leaves(expected))


@pytest.mark.parametrize("backend", ["reference", BACKEND])
@pytest.mark.parametrize("name", CASES)
def test_any_dimension_may_be_mapped(name, backend):
    """Bit for bit, where kernels of ours run: they compute a slice as they do alone."""
    function, args = CASES[name][0], arguments(name)
    is_ours = backend == BACKEND and not name.startswith("attention")
    tolerance = 0 if is_ours else 1e-5
    for first in (1, -1):
        dims = (first, *(None if i % 2 else 0 for i in range(len(args) - 1)))
        mapped = [
            x if d is None else torch.stack((x, x.sin(), x + 1), d)
            for x, d in zip(args, dims, strict=True)
        ]
        with use_backend(backend):
            ours = as_tuple(vmap(function, dims)(*mapped))
            expected = loop(function, dims)(*mapped)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("jacobian", [jacfwd, nightly(jacrev)])
@pytest.mark.parametrize("name", CASES)
def test_jacobians(name, jacobian):
    """They map tangents and cotangents of inputs and outputs that are not mapped."""
    function, args = CASES[name][0], arguments(name)
    last = len(args) - 1
    with use_backend("reference"):
        expected = torch.autograd.functional.jacobian(
            lambda x: function(*(y.double() for y in args[:last]), x), args[last].double()
        )
    with use_backend(BACKEND):
        assert_same(jacobian(function, argnums=last)(*args), as_tuple(expected))


@pytest.mark.parametrize("name", CASES)
def test_no_slices(name):
    args = arguments(name, 0)
    with use_backend(BACKEND):
        out = vmap(CASES[name][0])(*args)
        assert out.shape == (0, *CASES[name][0](*arguments(name)).shape)


@pytest.mark.parametrize("name", ["ada_layer_norm", "qkv_norm_rope", "transition_loss"])
def test_per_sample_gradients_inside_compile(name):
    function, args = CASES[name][0], arguments(name, 3)
    torch._dynamo.reset()
    with use_backend(BACKEND):
        mapped = vmap(gradients(function))
        compiled = torch.compile(mapped, backend="aot_eager", fullgraph=True)
        assert_same(compiled(*args), [x.double() for x in mapped(*args)])
