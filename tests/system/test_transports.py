"""Transports against the published implementation, and against their own calculus."""

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
    row = {name: value.view(-1, 1, 1, 1) for name, value in values.items()}
    check(row["alpha"] * given["x"] + row["sigma"] * given["z"], expected["x_t"], "x_t")
    check(row["d_alpha"] * given["x"] + row["d_sigma"] * given["z"], expected["v_t"], "v_t")


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
