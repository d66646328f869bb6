"""The objective against the published implementation, and its own promises."""

import pytest
import torch
from eager import randomise
from golden_files import relative_error

from tim.models import TiMTransformer2DModel
from tim.objective import TIME_WEIGHTS, TransitionObjective
from tim.transports import TRANSPORTS, make

TOLERANCE = {"jvp": 1e-4, "dde": 1e-3}  # relative, from the golden README


def test_golden_loss_and_gradients(golden_loss):
    meta, given = golden_loss.meta, golden_loss.group("input")
    model, ema = (TiMTransformer2DModel(**meta["params"]) for _ in range(2))
    model.load_state_dict(golden_loss.group("state"))
    if meta["enhance"]:
        ema.load_state_dict(golden_loss.group("ema"))
    objective = TransitionObjective(
        make(meta["transport"], **meta["transport_params"]), **meta["schedule"]
    )
    x, z, y, y_null = (given[name] for name in ("x", "z", "y", "y_null"))
    loss = objective(
        model, x, z, y, given["features_target"], ema, y_null, given["t"], given["r"],
        meta["n_diffusion"],
    )  # fmt: skip
    tolerance = TOLERANCE[meta["schedule"]["derivative_type"]]
    expected = golden_loss.group("output")
    assert relative_error(loss.weighted, expected["weighted_loss"]) < tolerance
    assert relative_error(loss.projection, expected["proj_loss"]) < tolerance
    assert relative_error(loss.denoising, expected["denoising_loss"]) < tolerance

    (loss.weighted + loss.projection).backward()
    gradients, parameters = golden_loss.group("grad"), dict(model.named_parameters())
    largest = max(g.norm() for g in gradients.values())
    for name, gradient in gradients.items():
        scale = max(gradient.norm(), 1e-3 * largest)
        assert (parameters[name].grad - gradient).norm() / scale < tolerance, name


TINY = dict(
    patch_size=1, in_channels=3, hidden_size=16, encoder_depth=1, depth=1, num_heads=2,
    num_classes=4, z_dim=6, projector_dim=8, lora_hidden_size=8,
)  # fmt: skip


def problem(batch=10, dtype=torch.float64, seed=0, **config):
    g = torch.Generator().manual_seed(seed)
    model = randomise(TiMTransformer2DModel(**TINY | config)).to(dtype)
    x, z = torch.randn(2, batch, 3, 2, 4, generator=g, dtype=dtype)
    return model, x, z, torch.randint(4, (batch,), generator=g)


def test_times():
    objective = TransitionObjective(make("OT_FM"), diffusion_ratio=0.5, consistency_ratio=0.1)
    t, r, n_diffusion = objective.sample_times(64, torch.Generator().manual_seed(0))
    assert t.dtype == r.dtype == torch.float32 and n_diffusion == 32
    assert torch.equal(t[:32], r[:32]) and bool((r[32:58] < t[32:58]).all())
    assert torch.equal(r[58:], torch.zeros(6)) and bool((r <= t).all())
    again = objective.sample_times(64, torch.Generator().manual_seed(0))
    assert torch.equal(t, again[0]) and torch.equal(r, again[1])


@pytest.mark.parametrize("name", TRANSPORTS)
def test_both_derivatives_are_the_trajectory_s(name):
    """dde and jvp agree with a float64 central difference of F along x_t = α x + σ z."""
    model, x, z, y = problem()
    transport = make(name)
    t = torch.linspace(0.3, 0.9, 10, dtype=torch.float64)
    r = t / 2

    def network(t):
        alpha, sigma, _, _ = (v.view(-1, 1, 1, 1) for v in transport.interpolant(t))
        times = transport.network_time(t), transport.network_time(r)
        return model(alpha * x + sigma * z, *times, y)

    with torch.no_grad():
        expected = (network(t + 1e-6) - network(t - 1e-6)) / 2e-6
    for kind, tolerance in (("jvp", 1e-7), ("dde", 2e-2)):
        objective = TransitionObjective(transport, derivative_type=kind, differential_epsilon=1e-3)
        assert relative_error(objective.derivative(model, x, z, y, t, r), expected) < tolerance


@pytest.mark.parametrize("kind", ["dde", "jvp"])
def test_n_diffusion_saves_work_and_changes_nothing(kind):
    model, x, z, y = problem()
    objective = TransitionObjective(make("OT_FM"), derivative_type=kind, weight_time_type="sqrt")
    t, r, n_diffusion = objective.sample_times(10, torch.Generator().manual_seed(1))
    t, r = t.double(), r.double()
    full, saved = (objective(model, x, z, y, t=t, r=r, n_diffusion=n) for n in (0, n_diffusion))
    torch.testing.assert_close(full.weighted, saved.weighted)
    batches = []
    model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    objective(model, x, z, y, t=t, r=r, n_diffusion=n_diffusion)
    rest = 10 - n_diffusion
    assert batches == [10, 2 * rest if kind == "dde" else rest]


def test_the_target_carries_no_gradient():
    """A perfect prediction has no gradient, whatever dF/dt's own dependence on the weights."""
    model, x, z, y = problem()
    objective = TransitionObjective(make("OT_FM"), diffusion_ratio=0.0)
    t, r, _ = objective.sample_times(10, torch.Generator().manual_seed(1))
    loss = objective(model, x, z, y, t=t.double(), r=r.double())
    dF = objective.derivative(model, x, z, y, t.double(), r.double())
    assert not dF.requires_grad and loss.weighted.requires_grad
    assert not loss.denoising.requires_grad


def test_nan_and_infinity_in_the_loss_are_tamed():
    model, x, z, y = problem()
    objective = TransitionObjective(make("OT_FM"), diffusion_ratio=1.0, consistency_ratio=0.0)
    x[0, 0, 0, 0] = float("nan")
    loss = objective(model, x, z, y)
    assert bool(torch.isfinite(loss.weighted)) and bool(torch.isfinite(loss.denoising))


def test_bfloat16_difference_is_taken_in_float32():
    model, x, z, y = problem(dtype=torch.bfloat16)
    objective = TransitionObjective(make("OT_FM"))
    t = torch.full((10,), 0.5)
    assert objective.derivative(model, x, z, y, t, t / 2).dtype == torch.float32


@pytest.mark.parametrize("weight_time_type", TIME_WEIGHTS)
def test_weights(weight_time_type):
    t, r = torch.tensor([0.9, 0.5]), torch.tensor([0.2, 0.5])
    objective = TransitionObjective(make("OT_FM", sigma_d=0.5), weight_time_type=weight_time_type)
    d, s = 0.9 - 0.2, 0.5
    expected = {
        "constant": 1.0,
        "reciprocal": 1 / (d + s),
        "sqrt": (d + s) ** -0.5,
        "square": (d + s) ** -2,
        "Soft-Min-SNR": 1 / (d * d + s * s),
    }[weight_time_type]
    torch.testing.assert_close(objective.time_weight(t, r), torch.tensor([expected, 1.0]))


def test_refusals():
    model, x, z, y = problem(dtype=torch.float32)
    for params, message in (
        (dict(derivative_type="vjp"), "derivative_type"),
        (dict(weight_time_type="cubic"), "weight_time_type"),
        (dict(diffusion_ratio=0.7, consistency_ratio=0.7), "shares of one batch"),
        (dict(differential_epsilon=0.0), "differential_epsilon"),
    ):
        with pytest.raises(ValueError, match=message):
            TransitionObjective(make("OT_FM"), **params)
    objective, t = TransitionObjective(make("OT_FM")), torch.full((10,), 0.5)
    with pytest.raises(ValueError, match="r must not be later than t"):
        objective(model, x, z, y, t=t, r=t + 0.1)
    with pytest.raises(ValueError, match="both t and r"):
        objective(model, x, z, y, t=t)
    with pytest.raises(ValueError, match="one shape"):
        objective(model, x, z[1:], y)
    with pytest.raises(ValueError, match="ema_model and y_null"):
        TransitionObjective(make("OT_FM", enhance_target=True))(model, x, z, y)
