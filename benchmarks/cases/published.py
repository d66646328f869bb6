"""TiM's sampling loop and training loss in plain PyTorch, as published, for OT-FM.

The eager side of the whole-model comparisons; `model` is anything called as model(x, t, r, y).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 0.005


@torch.no_grad()
def sample(
    model: nn.Module, z: Tensor, y: Tensor, y_null: Tensor, num_steps: int, cfg_scale: float
) -> Tensor:
    """Noise z (B, C, H, W) at t = 1 to data at 0, guided on every step; the state is float64."""
    x, dtype, batch = z.double(), next(model.parameters()).dtype, len(z)
    both_y = torch.cat((y, y_null))
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    for t, r in zip(times[:-1], times[1:], strict=True):
        now, then = (torch.full((2 * batch,), time, device=z.device) for time in (t, r))
        both = model(torch.cat((x, x)).to(dtype), now, then, both_y).double()
        cond, uncond = both.chunk(2)
        x = x - (t - r) * (uncond + cfg_scale * (cond - uncond))
    return x.to(z.dtype)


def mix(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x + t * z


def derivative(
    network: nn.Module, x: Tensor, z: Tensor, t: Tensor, r: Tensor, y: Tensor, kind: str
) -> Tensor:
    """dF/dt along the trajectory, in t's dtype: "dde", two forwards, or "jvp", forward mode through
    attention that materialises its N×N scores."""
    own = next(network.parameters()).dtype
    if kind == "jvp":
        tangents = z - x, torch.ones_like(t)
        return torch.func.jvp(
            lambda x_t, t: network(x_t.to(own), t, r, y, jvp=True), (mix(x, z, t), t), tangents
        )[1]
    later, earlier = (
        network(mix(x, z, s).to(own), s, r, y).to(t.dtype) for s in (t + EPSILON, t - EPSILON)
    )
    return (later - earlier) / (2 * EPSILON)


def training_loss(
    model: nn.Module, x: Tensor, z: Tensor, y: Tensor, t: Tensor, r: Tensor, n_diffusion: int,
    kind: str,
) -> Tensor:  # fmt: skip
    """The transition objective with the published weight, 1/√(1 + tan t − tan r), and a derivative
    of that kind. The first n_diffusion samples have r = t."""
    prediction = model(mix(x, z, t), t, r, y).float()
    rest = slice(n_diffusion, None)
    with torch.no_grad():
        D = derivative(model, x[rest], z[rest], t[rest], r[rest], y[rest], kind)
        target = z - x
        target[rest] -= (t - r)[rest].view(-1, 1, 1, 1) * D
        weight = torch.where(r == t, torch.ones_like(t), (1 + t.tan() - r.tan()).rsqrt())
    loss = (prediction - target).square().flatten(1).mean(1)
    loss = loss + (1 - F.cosine_similarity(prediction, target, dim=1)).flatten(1).mean(1)
    return (weight / (loss.detach() + 1e-5) * loss).mean()
