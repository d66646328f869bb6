"""The sampler against the published implementation, and its own promises."""

import pytest
import torch
from golden_files import relative_error

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


class Recorder(torch.nn.Module):
    """A network that remembers the times it was asked for and points straight at zero."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, x, t, r, y):
        self.calls.append((float(t[0]), float(r[0]), len(x)))
        return x * self.scale / t.view(-1, 1, 1, 1)


def run(num_steps=4, **options):
    model, z = Recorder(), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(2, dtype=torch.long)
    options = {"num_steps": num_steps} | options
    return sample(model, make("OT_FM"), z, y, y, **options), model.calls


def test_times_of_each_sample_type():
    assert run()[1] == [(1.0, 0.75, 2), (0.75, 0.5, 2), (0.5, 0.25, 2), (0.25, 0.0, 2)]
    assert [call[:2] for call in run(2, sample_type="ddiffusion")[1]] == [(1.0, 1.0), (0.5, 0.5)]
    assert run(1, T_max=0.8, T_min=0.1)[1][0][:2] == pytest.approx((0.8, 0.1))


def test_guidance_interval_doubles_only_its_own_steps():
    batches = [call[2] for call in run(4, cfg_scale=2.0, cfg_low=0.3, cfg_high=0.8)[1]]
    assert batches == [2, 4, 4, 2]  # t = 1, .75, .5, .25
    assert {call[2] for call in run(4, cfg_scale=1.0)[1]} == {2}


def test_trajectory_and_result():
    trajectory, _ = run(return_trajectory=True)
    assert trajectory.shape == (5, 2, 3, 4, 4) and trajectory.dtype == torch.float32
    assert torch.equal(trajectory[-1], run()[0])


def test_stochastic_sampling_follows_its_generator():
    draws = [
        run(stochasticity_ratio=0.5, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    of_each = (
        kind(torch.Generator().manual_seed(seed) for seed in (1, 2)) for kind in (list, tuple)
    )
    listed, tupled = (run(stochasticity_ratio=0.5, generator=several)[0] for several in of_each)
    assert torch.equal(listed, tupled)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_steps=0), "num_steps must be at least 1, got 0"),
        (dict(T_max=0.1, T_min=0.5), "T_max must exceed T_min"),
        (dict(sample_type="diffusion"), "sample_type"),
        (dict(stochasticity_ratio=-1.0), "stochasticity_ratio"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_bad_tensors_are_refused():
    model, transport = Recorder(), make("OT_FM")
    z, y = torch.randn(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="needs y_null"):
        sample(model, transport, z, y, num_steps=2, cfg_scale=2.0)
    with pytest.raises(ValueError, match="y_null must be shaped as y"):
        sample(model, transport, z, y, y[:1], num_steps=2, cfg_scale=2.0)
    z[1, 2, 3, 3] = float("inf")
    with pytest.raises(ValueError, match="must be finite, got 1"):
        sample(model, transport, z, y, num_steps=2)
