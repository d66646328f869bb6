"""The eager loop and loss that the benchmarks compare with are those of `tim`."""

import pytest
import torch

from benchmarks.cases import published
from benchmarks.cases.tasks import CFG_SCALE, OBJECTIVE, fill_with_noise
from tests.eager import EagerTiM
from tim.models import TiMTransformer2DModel
from tim.objective import TransitionObjective
from tim.sampling import sample
from tim.transports import make

TINY = dict(
    patch_size=2, in_channels=3, hidden_size=48, encoder_depth=1, depth=2, num_heads=2,
    num_classes=5, z_dim=6, projector_dim=10, lora_hidden_size=8,
)  # fmt: skip
TRANSPORT = make("OT_FM", P_mean=-0.4, P_std=1.0, sigma_d=1.0)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    eager = fill_with_noise(EagerTiM(**TINY))
    tim = TiMTransformer2DModel(**TINY)
    tim.load_state_dict(eager.state_dict())
    return eager, tim


def noise(batch: int = 8):
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, batch, 3, 4, 6, generator=generator)
    return x, z, torch.arange(batch) % 5


@pytest.mark.parametrize("derivative", ["dde", "jvp"])
def test_training_loss_and_gradients(models, derivative):
    x, z, y = noise()
    objective = TransitionObjective(TRANSPORT, derivative_type=derivative, **OBJECTIVE)
    t, r, n_diffusion = objective.sample_times(8, torch.Generator().manual_seed(1))
    eager, tim = models
    theirs = published.training_loss(eager, x, z, y, t, r, n_diffusion, derivative)
    ours = objective(tim, x, z, y, t=t, r=r, n_diffusion=n_diffusion).weighted
    torch.testing.assert_close(ours, theirs)
    for name in ("blocks.0.attn.qkv.weight", "final_layer.linear.weight"):
        a, b = (torch.autograd.grad(loss, model.get_parameter(name), retain_graph=True)[0]
                for loss, model in ((ours, tim), (theirs, eager)))  # fmt: skip
        assert (a - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("steps", [1, 4])
def test_samples(models, steps):
    _, z, y = noise()
    eager, tim = models
    y_null = torch.full_like(y, 5)
    theirs = published.sample(eager, z, y, y_null, steps, CFG_SCALE)
    ours = sample(tim, TRANSPORT, z, y, y_null, num_steps=steps, cfg_scale=CFG_SCALE, cfg_high=1.1)
    torch.testing.assert_close(ours, theirs)
    unguided = published.sample(eager, z, y, y_null, steps, 1.0)
    assert (theirs - unguided).norm() > 100 * (ours - theirs).norm()
