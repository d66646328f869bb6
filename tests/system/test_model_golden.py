"""The model against the published implementation's outputs (float32, CPU)."""

import pytest
import torch
from golden_files import relative_error

from tim.models import TiMTransformer2DModel, transformer
from tim_kernels import grid_positions, rope_tables
from tim_kernels.network.forward import prepare, run

FORWARD, DERIVATIVE = 2e-5, 1e-4  # relative, from the golden README


@pytest.fixture(params=["whole", "cut"])
def network(request, monkeypatch):
    """`predict`, or everything that does not depend on x formed before."""

    def predict(model, x, t, r, y, *, new_condition, **options):
        return run(model, x, prepare(model, t, r, y, new_condition=new_condition), **options)

    if request.param == "cut":
        monkeypatch.setattr(transformer, "predict", predict)


def load(golden) -> TiMTransformer2DModel:
    model = TiMTransformer2DModel(**golden.meta["params"])
    model.load_state_dict(golden.group("state"), strict=True)
    return model


@pytest.mark.usefixtures("network")
def test_sample_and_features(golden_model):
    given, expected = golden_model.group("input"), golden_model.group("output")
    model = load(golden_model)
    args = [given[name] for name in ("x", "t", "r", "y")]
    sample, features = model(*args, return_features=True)
    assert relative_error(sample, expected["sample"]) < FORWARD
    assert relative_error(features, expected["features"]) < FORWARD
    assert torch.equal(model(*args), sample)


@pytest.mark.usefixtures("network")
def test_gradients(golden_model):
    given, expected = golden_model.group("input"), golden_model.group("output")
    model = load(golden_model)
    x = given["x"].clone().requires_grad_()
    sample, features = model(x, given["t"], given["r"], given["y"], return_features=True)
    ((sample * given["grad_sample"]).sum() + (features * given["grad_features"]).sum()).backward()
    assert relative_error(x.grad, expected["grad_x"]) < DERIVATIVE

    gradients = golden_model.group("grad")
    largest = max(g.norm() for g in gradients.values())
    parameters = dict(model.named_parameters())
    assert set(gradients) == set(parameters)
    for name, gradient in gradients.items():
        scale = max(gradient.norm(), 1e-3 * largest)
        assert (parameters[name].grad - gradient).norm() / scale < DERIVATIVE, name


@pytest.mark.usefixtures("network")
def test_jvp(golden_model):
    given, expected = golden_model.group("input"), golden_model.group("output")
    model = load(golden_model)
    t, r = given["t"], given["r"]
    _, jvp = torch.func.jvp(
        lambda x, t, r: model(x, t, r, given["y"]),
        (given["x"], t, r),
        (given["tangent_x"], torch.ones_like(t), torch.zeros_like(r)),
    )
    assert relative_error(jvp, expected["jvp"]) < DERIVATIVE


def test_rope_tables(golden_model):
    expected, params = golden_model.group("output"), golden_model.meta["params"]
    height, width = (size // params["patch_size"] for size in golden_model.meta["shape"][2:])
    positions = grid_positions(height, width, "upstream")
    cos, sin = rope_tables(positions, params["hidden_size"] // params["num_heads"])
    assert relative_error(cos, expected["rope_cos"]) < FORWARD
    assert relative_error(sin, expected["rope_sin"]) < FORWARD
