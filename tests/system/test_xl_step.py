"""A training step of the XL network at batch 1 equals the plain published form's, in float32."""

import pytest
import torch
from eager import EagerTiM, randomise

from tim.config import load
from tim.models import TiMTransformer2DModel
from tim.objective import TransitionObjective
from tim.transports import make


class Published(EagerTiM):
    """Called as ours is."""

    def forward(self, x, t, r, y, return_features=False):
        return super().forward(x, t, r, y, return_zs=return_features)


def step(kind) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of one sample, whose r < t, and its gradients."""
    params = dict(load("xl-256").model.network.params)
    params = {name: value for name, value in params.items() if name in WANTED}
    model = randomise(kind(**params))
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 1, 4, 32, 32, generator=g)
    target = torch.randn(1, 256, 768, generator=g)
    objective = TransitionObjective(make("OT_FM"), derivative_type="dde")
    times = dict(t=torch.tensor([0.8]), r=torch.tensor([0.3]), n_diffusion=0)
    loss = objective(model, x, z, torch.tensor([7]), target, **times)
    (loss.weighted + loss.projection).backward()
    return loss.weighted.detach(), {n: p.grad for n, p in model.named_parameters()}


WANTED = {
    "input_size", "patch_size", "in_channels", "hidden_size", "encoder_depth", "depth", "num_heads",
    "mlp_ratio", "class_dropout_prob", "num_classes", "z_dim", "projector_dim", "new_condition",
    "use_new_embed", "qk_norm", "distance_aware", "lora_hidden_size",
}  # fmt: skip


@pytest.mark.nightly  # 14 GB and about a minute
def test_loss_and_gradients():
    expected, gradients = step(Published)
    loss, ours = step(TiMTransformer2DModel)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert ours.keys() == gradients.keys()
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    error = torch.stack([(ours[n] - g).norm() for n, g in gradients.items()]).norm()
    assert error < 1e-4 * total
