"""Transports against the published implementation, and against their own calculus."""

import math

import pytest
import torch
from golden_files import relative_error

from tim.transports import TRANSPORTS, make

FORWARD = 2e-5  # relative, from the golden README


def check(actual, expected, name):
    assert relative_error(actual, expected) < FORWARD, name


def test_interpolant_and_network_time(golden_transport):
    transport = make(golden_transport.meta["transport"], **golden_transport.meta["params"])
    given, expected = golden_transport.group("input"), golden_transport.group("output")
    names = ("alpha", "sigma", "d_alpha", "d_sigma")
    values = dict(zip(names, transport.interpolant(given["t"]), strict=True))
    for name in names:
        torch.testing.assert_close(values[name], expected[name], rtol=FORWARD, atol=1e-7)
    check(transport.network_time(given["t"]), expected["c_noise"], "c_noise")
    alpha, sigma, d_alpha, d_sigma = (values[name].view(-1, 1, 1, 1) for name in names)
    check(alpha * given["x"] + sigma * given["z"], expected["x_t"], "x_t")
    check(d_alpha * given["x"] + d_sigma * given["z"], expected["v_t"], "v_t")


def test_target_and_step(golden_transport):
    meta = golden_transport.meta
    given, expected = golden_transport.group("input"), golden_transport.group("output")
    x, z, t, r, dF = (given[name] for name in ("x", "z", "t", "r", "dF"))
    transport = make(meta["transport"], **meta["params"])
    check(transport.target(x, z, t, r, dF), expected["target"], "target")
    check(transport.step(expected["x_t"], t, r, given["F"]), expected["x_r"], "x_r")

    weights = {name: meta[name] for name in ("w_gt", "w_cond", "w_start", "w_end")}
    enhanced = make(meta["transport"], **meta["params"], enhance_target=True, **weights)
    target = enhanced.target(x, z, t, r, dF, given["F_cond"], given["F_uncond"])
    check(target, expected["target_enhanced"], "target_enhanced")
    with pytest.raises(ValueError, match="F_cond"):
        enhanced.target(x, z, t, r, dF)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_derivatives_and_draws(name):
    transport = make(name)
    t = transport.sample_t(500, torch.Generator().manual_seed(0), dtype=torch.float64)
    assert t.shape == (500,) and t.dtype == torch.float64 and bool((t > 0).all())
    assert torch.equal(t, transport.sample_t(500, torch.Generator().manual_seed(0), "cpu", t.dtype))
    t = t.requires_grad_()
    alpha, sigma, d_alpha, d_sigma = transport.interpolant(t)
    for value, derivative in ((alpha, d_alpha), (sigma, d_sigma)):
        if value.requires_grad:
            (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        else:
            expected = torch.zeros_like(t)
        torch.testing.assert_close(derivative, expected)


SIGMA_AT_T_MAX = {
    "OT_FM": 1.0,
    "TrigFlow": math.sin(1.57),
    "EDM": 80 / math.hypot(80, 0.5),
    "VP_SDE": (1 - math.exp(-0.5 * 19.9 - 0.1)) ** 0.5,
    "VE_SDE": 100.0,
}


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_initial_state(name, dtype):
    """The noise's share of x_t at T_max; all but VE-SDE's is of variance 1."""
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = noise.clone()
    state = make(name).initial_state(noise)
    assert state.dtype == dtype and torch.equal(noise, before)
    torch.testing.assert_close(state, noise * SIGMA_AT_T_MAX[name])
    transport = make(name, T_max=0.7)
    sigma = transport.interpolant(torch.tensor([0.7], dtype=torch.float64))[1]
    torch.testing.assert_close(transport.initial_state(noise), noise * float(sigma))


@pytest.mark.parametrize("name", TRANSPORTS)
def test_the_derivative_s_coefficient_is_that_of_the_step(name):
    """a_D = −b / (∂b/∂t): the derivative of x_r = a x_t + b F vanishes at the target."""
    transport = make(name)
    t = torch.linspace(0.2, 0.9, 5, dtype=torch.float64, requires_grad=True)
    r = t.detach() / 3
    b = transport.step_coefficients(t, r).b
    (d_b,) = torch.autograd.grad(b.sum(), t)
    torch.testing.assert_close(transport.target_coefficients(t, r).a_D, -b / d_b)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_perfect_prediction_at_t_steps_along_the_trajectory(name):
    transport = make(name, sigma_d=1.0)  # EDM's published step is exact there alone
    x, z = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    t = torch.linspace(0.2, 0.9, 5, dtype=torch.float64)

    def state(time):
        alpha, sigma, _, _ = (v.view(-1, 1, 1) for v in transport.interpolant(time))
        return alpha * x + sigma * z

    stepped = transport.step(state(t), t, t / 3, transport.target(x, z, t, t, None))
    torch.testing.assert_close(stepped, state(t / 3))


@pytest.mark.parametrize("name", TRANSPORTS)
def test_step_of_zero_length_stays(name):
    transport = make(name)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(transport.step(x, t, t, torch.randn_like(x)), x)


def test_stochastic_step():
    transport = make("OT_FM")
    t, r = torch.tensor([1.0, 0.8, 0.5]), torch.tensor([0.5, 0.4, 0.0])
    x, F, noise = torch.randn(3, 3, 4).unbind()
    s, dt = 0.3, (t - r).unsqueeze(1)
    plain = transport.step(x, t, r, F)
    stepped = transport.step(x, t, r, F, s, noise)
    u = t.unsqueeze(1)
    drawn = plain - s * (x + (1 - u) * F) * dt + (2 * s * u * dt).sqrt() * noise
    torch.testing.assert_close(stepped[1], drawn[1])  # only strictly between T_max and T_min
    torch.testing.assert_close(stepped[[0, 2]], plain[[0, 2]])
    with pytest.raises(ValueError, match="noise"):
        transport.step(x, t, r, F, s)
    with pytest.raises(ValueError, match="no stochastic step"):
        make("EDM").step(x, t, r, F, s, noise)


def test_refusals():
    with pytest.raises(ValueError, match="OT_FM, TrigFlow"):
        make("OTFM2")
    with pytest.raises(ValueError, match="beta_minimum"):
        make("VP_SDE", beta_minimum=1.0)
    with pytest.raises(ValueError, match="T_max"):
        make("OT_FM", T_max=0.0)
