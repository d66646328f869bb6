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


def training_loss(
    model: nn.Module, x: Tensor, z: Tensor, y: Tensor, t: Tensor, r: Tensor, n_diffusion: int,
    derivative: str,
) -> Tensor:  # fmt: skip
    """The transition objective with the published weight, 1/√(1 + tan t − tan r).

    The first n_diffusion samples have r = t. `derivative` is "dde", two forwards of the rest, or
    "jvp", forward mode through attention that materialises its N×N scores.
    """
    prediction = model(mix(x, z, t), t, r, y).float()
    rest = slice(n_diffusion, None)
    with torch.no_grad():
        X, Z, Y, T, R = (v[rest] for v in (x, z, y, t, r))
        if derivative == "dde":
            later = model(mix(X, Z, T + EPSILON), T + EPSILON, R, Y)
            earlier = model(mix(X, Z, T - EPSILON), T - EPSILON, R, Y)
            D = (later.float() - earlier) / (2 * EPSILON)
        else:
            tangents = Z - X, torch.ones_like(T)
            D = torch.func.jvp(
                lambda x_t, t: model(x_t, t, R, Y, jvp=True), (mix(X, Z, T), T), tangents
            )[1]
        target = z - x
        target[rest] -= (T - R).view(-1, 1, 1, 1) * D
        weight = torch.where(r == t, torch.ones_like(t), (1 + t.tan() - r.tan()).rsqrt())
    loss = (prediction - target).square().flatten(1).mean(1)
    loss = loss + (1 - F.cosine_similarity(prediction, target, dim=1)).flatten(1).mean(1)
    return (weight / (loss.detach() + 1e-5) * loss).mean()
