"""The published implementation's own numbers, with the fused ops."""

import pytest
import torch
from parity import BACKEND, DEVICE

from tim_kernels.dispatch.backend import use_backend

pytest.importorskip("diffusers", reason="tim needs diffusers")
from tim.models import TiMTransformer2DModel  # noqa: E402
from tim.objective import TransitionObjective  # noqa: E402
from tim.sampling import sample  # noqa: E402
from tim.transports import make  # noqa: E402

TOLERANCE = {"jvp": 1e-4, "dde": 1e-3, "sample": 2e-5}  # relative, from the golden README


@pytest.fixture(autouse=True)
def fused():
    with use_backend(BACKEND):
        yield


def on_device(tensors: dict) -> dict:
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def error(actual, expected) -> float:
    return float((actual.detach().cpu().double() - expected).norm() / expected.double().norm())


def check_gradients(actual, expected, tolerance: float) -> None:
    """Against max(their norm, 1e-3 of the largest), as the golden README says."""
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        difference = (actual[name].grad.cpu() - gradient).norm()
        assert difference < tolerance * max(gradient.norm(), 1e-3 * largest), name


def test_model(golden_model):
    meta, given = golden_model.meta, on_device(golden_model.group("input"))
    expected = golden_model.group("output")
    model = TiMTransformer2DModel(**meta["params"]).to(DEVICE)
    model.load_state_dict(golden_model.group("state"))
    x, t, r, y = (given[name] for name in ("x", "t", "r", "y"))
    leaf = x.clone().requires_grad_()
    sample, features = model(leaf, t, r, y, return_features=True)
    ((sample * given["grad_sample"]).sum() + (features * given["grad_features"]).sum()).backward()
    assert error(sample, expected["sample"]) < TOLERANCE["sample"]
    assert error(features, expected["features"]) < TOLERANCE["sample"]
    assert error(leaf.grad, expected["grad_x"]) < TOLERANCE["jvp"]
    check_gradients(dict(model.named_parameters()), golden_model.group("grad"), TOLERANCE["jvp"])

    tangents = given["tangent_x"], torch.ones_like(t), torch.zeros_like(r)
    _, jvp = torch.func.jvp(lambda x, t, r: model(x, t, r, y), (x, t, r), tangents)
    assert error(jvp, expected["jvp"]) < TOLERANCE["jvp"]


def test_losses_and_gradients(golden_loss):
    meta, given = golden_loss.meta, on_device(golden_loss.group("input"))
    model, ema = (TiMTransformer2DModel(**meta["params"]).to(DEVICE) for _ in range(2))
    model.load_state_dict(golden_loss.group("state"))
    if meta["enhance"]:
        ema.load_state_dict(golden_loss.group("ema"))
    transport = make(meta["transport"], **meta["transport_params"])
    loss = TransitionObjective(transport, **meta["schedule"])(
        model, given["x"], given["z"], given["y"], given["features_target"], ema, given["y_null"],
        given["t"], given["r"], meta["n_diffusion"],
    )  # fmt: skip
    (loss.weighted + loss.projection).backward()

    tolerance = TOLERANCE[meta["schedule"]["derivative_type"]]
    names = ("weighted_loss", "proj_loss", "denoising_loss")
    for name, value in zip(names, loss[:3], strict=True):
        assert error(value, golden_loss.group("output")[name]) < tolerance, name
    check_gradients(dict(model.named_parameters()), golden_loss.group("grad"), tolerance)


def test_trajectories(golden_sample):
    meta, given = golden_sample.meta, on_device(golden_sample.group("input"))
    model = TiMTransformer2DModel(**meta["params"]).to(DEVICE)
    model.load_state_dict(golden_sample.group("state"))
    transport = make(meta["transport"], **meta["transport_params"])
    generator = torch.Generator().manual_seed(meta["noise_seed"])  # the noise was drawn on a CPU
    trajectory = sample(
        model, transport, given["z"], given["y"], given["y_null"],
        generator=generator, return_trajectory=True, **meta["sample"],
    )  # fmt: skip
    expected = golden_sample.group("output")["trajectory"]
    assert error(trajectory, expected) < TOLERANCE["sample"]
