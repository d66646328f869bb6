"""The published implementation's own numbers, with the fused ops."""

import pytest
import torch

from tim.models import TiMTransformer2DModel
from tim.objective import TransitionObjective
from tim.sampling import sample
from tim.transports import make
from tim_kernels.backend import use_backend

TOLERANCE = {"jvp": 1e-4, "dde": 1e-3, "sample": 2e-5}  # relative, from the golden README


@pytest.fixture(autouse=True)
def fused():
    with use_backend("triton"):
        yield


WHOLE = ("enhanced", "trigflow")  # losses of a wholly fused model, slow in the interpreter


class OnReference(torch.nn.Module):
    """The model on the reference: what is around it is fused."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        with use_backend("reference"):
            return self.model(*args, **kwargs)


def error(actual, expected) -> float:
    return float((actual.detach().double() - expected).norm() / expected.double().norm())


def test_losses_and_gradients(golden_loss, request):
    meta, given = golden_loss.meta, golden_loss.group("input")
    model, ema = (TiMTransformer2DModel(**meta["params"]) for _ in range(2))
    model.load_state_dict(golden_loss.group("state"))
    if meta["enhance"]:
        ema.load_state_dict(golden_loss.group("ema"))
    is_whole = any(name in request.node.name for name in WHOLE)
    network, ema = (m if is_whole else OnReference(m) for m in (model, ema))
    transport = make(meta["transport"], **meta["transport_params"])
    loss = TransitionObjective(transport, **meta["schedule"])(
        network, given["x"], given["z"], given["y"], given["features_target"], ema, given["y_null"],
        given["t"], given["r"], meta["n_diffusion"],
    )  # fmt: skip
    (loss.weighted + loss.projection).backward()

    tolerance = TOLERANCE[meta["schedule"]["derivative_type"]]
    for name, value in zip(("weighted_loss", "proj_loss", "denoising_loss"), loss, strict=True):
        assert error(value, golden_loss.group("output")[name]) < tolerance, name
    gradients, parameters = golden_loss.group("grad"), dict(model.named_parameters())
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        difference = (parameters[name].grad - gradient).norm()
        assert difference < tolerance * max(gradient.norm(), 1e-3 * largest), name


def test_trajectories(golden_sample):
    meta, given = golden_sample.meta, golden_sample.group("input")
    model = TiMTransformer2DModel(**meta["params"])
    model.load_state_dict(golden_sample.group("state"))
    transport = make(meta["transport"], **meta["transport_params"])
    torch.manual_seed(meta["noise_seed"])
    trajectory = sample(
        model, transport, given["z"], given["y"], given["y_null"],
        return_trajectory=True, **meta["sample"],
    )  # fmt: skip
    expected = golden_sample.group("output")["trajectory"]
    assert error(trajectory, expected) < TOLERANCE["sample"]
