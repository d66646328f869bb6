"""The objective against the published implementation, and its own promises."""

import pytest
import torch
from conftest import relative_error

from tim.models import TiMTransformer2DModel
from tim.objective import TransitionObjective
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
