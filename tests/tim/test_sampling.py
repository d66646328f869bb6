"""The sampler against the published implementation, and its own promises."""

import torch
from conftest import relative_error

from tim.models import TiMTransformer2DModel
from tim.sampling import sample
from tim.transports import make


def test_golden_trajectory(golden_sample):
    meta, given = golden_sample.meta, golden_sample.group("input")
    model = TiMTransformer2DModel(**meta["params"])
    model.load_state_dict(golden_sample.group("state"))
    transport = make(meta["transport"], **meta["transport_params"])
    torch.manual_seed(meta["noise_seed"])
    trajectory = sample(
        model, transport, given["z"], given["y"], given["y_null"],
        return_trajectory=True, **meta["sample"],
    )  # fmt: skip
    assert relative_error(trajectory, golden_sample.group("output")["trajectory"]) < 2e-5
