"""Products with weights that have no tangent: PyTorch's values for two thirds of its work."""

import pytest
import torch
import torch.nn.functional as F
from parity import DEVICE, noise
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tim_kernels.network.forward_mode import lean

pytest.importorskip("diffusers", reason="tim.models needs diffusers")
from tim.models import TiMTransformer2DModel  # noqa: E402

X, T = (noise(2, 3, 4, seed=i, dtype=torch.double, device=DEVICE) for i in range(2))
W = noise(5, 4, seed=2, dtype=torch.double, device=DEVICE)
BIAS = noise(5, seed=3, dtype=torch.double, device=DEVICE)
PRODUCTS = {
    "linear": lambda x, w, b: F.linear(x, w),
    "linear with bias": lambda x, w, b: F.linear(x, w, b),
    "linear with named bias": lambda x, w, b: F.linear(x, w, bias=b),
    "layer": lambda x, w, b: torch.func.functional_call(
        torch.nn.Linear(4, 5), {"weight": w, "bias": b}, (x,)
    ),
    "bmm": lambda x, w, b: torch.bmm(x, w.mT.expand(2, 4, 5)),
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x, w.mT.expand(2, 4, 5)),
}


def flops(function, *args) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


SCALED = {  # options are PyTorch's own business
    "scaled baddbmm": lambda x, w, b: torch.baddbmm(b, x, w.mT.expand(2, 4, 5), alpha=2),
}


@pytest.mark.parametrize("name", PRODUCTS | SCALED)
def test_values_tangents_and_gradients(name):
    product = (PRODUCTS | SCALED)[name]
    results = []
    for function in (product, lean(product)):
        w = W.clone().requires_grad_()
        out, tangent = torch.func.jvp(lambda x: function(x, w, BIAS), (X,), (T,))  # noqa: B023
        gradients = [torch.autograd.grad(y.square().sum(), w)[0] for y in (out, tangent)]
        both = torch.func.jvp(lambda x, w: function(x, w, BIAS), (X, W), (T, W.cos()))  # noqa: B023
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(function(forward_ad.make_dual(X, T), W, BIAS))
        results.append([out, tangent, *gradients, *both, dual.primal, dual.tangent])
    for plain, ours in zip(*results, strict=True):
        assert plain.dtype == ours.dtype
        torch.testing.assert_close(ours, plain, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", PRODUCTS)
def test_two_products_instead_of_three(name):
    product = PRODUCTS[name]
    one = flops(product, X, W, BIAS)

    def derivative(function):
        return flops(lambda: torch.func.jvp(lambda x: function(x, W, BIAS), (X,), (T,)))

    assert (derivative(product), derivative(lean(product))) == (3 * one, 2 * one)


def test_only_while_it_runs_and_only_under_forward_mode():
    modes = []

    def look(x):
        modes.append(torch._C._len_torch_function_stack())
        return x

    lean(look)(X)
    torch.func.jvp(lean(look), (X,), (T,))
    torch.func.jvp(look, (X,), (T,))
    assert modes == [0, 1, 0]


def test_the_model_s_derivative_costs_two_forwards():
    model = TiMTransformer2DModel(
        patch_size=1, in_channels=3, hidden_size=48, encoder_depth=1, depth=3, num_heads=2,
        num_classes=4, z_dim=6, projector_dim=8,
    ).to(DEVICE).requires_grad_(False)  # fmt: skip
    x = noise(4, 3, 4, 4, device=DEVICE)
    t, y = torch.linspace(0.3, 0.9, 4, device=DEVICE), torch.arange(4, device=DEVICE)
    with sdpa_kernel(SDPBackend.MATH):  # whose products the counter sees
        forward = flops(model, x, t, t / 2, y)

    def derivative(x, t):
        return model(x, t, t / 2, y)

    assert flops(torch.func.jvp, derivative, (x, t), (x, torch.ones_like(t))) <= 2.1 * forward
