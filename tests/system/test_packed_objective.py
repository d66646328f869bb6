"""The loss of packed pictures is the mean of those of each alone, in value and gradients."""

import pytest
import torch
from eager import randomise

from tim.models import TiMTransformer2DModel, pack
from tim.objective import TransitionObjective
from tim.transports import TRANSPORTS, make

TINY = dict(
    patch_size=2, in_channels=3, hidden_size=16, encoder_depth=1, depth=2, num_heads=2,
    num_classes=4, z_dim=6, projector_dim=8, lora_hidden_size=8,
)  # fmt: skip
SIZES = (4, 6), (2, 2), (6, 4), (4, 10), (2, 8)
N_DIFFUSION = 2


def problem(text=False, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    model, ema = (
        randomise(TiMTransformer2DModel(**TINY | dict(cap_feat_dim=5 if text else None)), seed)
        for seed in (0, 1)
    )
    x, z = ([torch.randn(3, *s, generator=g, dtype=dtype) for s in SIZES] for _ in range(2))
    S = len(SIZES)
    y, y_null = torch.arange(S) % 4, torch.full((S,), 4)
    if text:
        y, y_null = torch.randn(2, S, 3, 5, generator=g, dtype=dtype)
    features = [torch.randn(h * w // 4, 6, generator=g, dtype=dtype) for h, w in SIZES]
    t = torch.linspace(0.3, 0.9, S, dtype=dtype)
    r = torch.where(torch.arange(S) < N_DIFFUSION, t, t / 2)
    return model.to(dtype), ema.to(dtype), x, z, y, y_null, features, t, r


def packed(objective, model, ema, x, z, y, y_null, features, t, r):
    (x, packing), (z, _) = pack(x, 2), pack(z, 2)
    return objective(
        model, x, z, y, torch.cat(features), ema, y_null, t, r, N_DIFFUSION, packing=packing
    )


def one_by_one(objective, model, ema, x, z, y, y_null, features, t, r):
    """The mean of the losses of each."""
    each = [
        objective(
            model, x[i][None], z[i][None], y[i : i + 1], features[i][None], ema,
            y_null[i : i + 1], t[i : i + 1], r[i : i + 1], int(i < N_DIFFUSION),
        )
        for i in range(len(x))
    ]  # fmt: skip
    return [torch.stack(term).mean() for term in zip(*each, strict=True)]


def gradients(model, loss):
    model.zero_grad()
    (loss[0] + loss[1]).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


DERIVATIVES = {
    "dde": {},
    "jvp": dict(derivative_type="jvp"),
    "share_primal": dict(derivative_type="jvp", share_primal=True),
}


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_every_transport_and_derivative(name, derivative):
    compare(make(name), derivative, problem())


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_text(derivative):
    compare(make("OT_FM"), derivative, problem(text=True))


@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
def test_an_enhanced_target(text):
    compare(make("OT_FM", enhance_target=True, w_cond=0.75), "dde", problem(text))


def test_float32():
    compare(make("OT_FM"), "jvp", problem(dtype=torch.float32), 2e-6)


def compare(transport, derivative, given, bound=1e-10):
    objective = TransitionObjective(
        transport, weight_time_type="sqrt", weight_time_tangent=True, **DERIVATIVES[derivative]
    )
    ours, expected = (loss(objective, *given) for loss in (packed, one_by_one))
    for i, of in enumerate((bound, 1e-6, bound)):  # features are compared in float32
        torch.testing.assert_close(ours[i], expected[i], rtol=of, atol=0)
    ours, expected = (gradients(given[0], loss) for loss in (ours, expected))
    assert (ours - expected).norm() <= max(bound, 1e-6) * expected.norm()


def test_what_is_not_finite_stays_in_its_picture():
    """As a picture alone would, it counts as nothing, and its neighbours as ever."""
    objective = TransitionObjective(make("OT_FM"))
    model, ema, x, *others = problem()
    x[1][0, 0, 0] = float("nan")
    ours, expected = (
        loss(objective, model, ema, x, *others) for loss in (packed, one_by_one)
    )  # fmt: skip
    assert ours.denoising.isfinite() and bool(ours.denoising > 0)
    torch.testing.assert_close(ours.denoising, expected[2])


def test_times_are_drawn_for_pictures():
    model, _, x, z, y, *_ = problem(dtype=torch.float32)
    (x, packing), (z, _) = pack(x, 2), pack(z, 2)
    loss = TransitionObjective(make("OT_FM"))(model, x, z, y, packing=packing)
    assert loss.weighted.isfinite()
    with pytest.raises(ValueError, match="must be the 27 tokens of the packing, got"):
        TransitionObjective(make("OT_FM"))(model, x[1:], z[1:], y, packing=packing)
    with pytest.raises(ValueError, match=r"t must be .* shape \(5,\)"):
        t = torch.ones(len(x))
        TransitionObjective(make("OT_FM"))(model, x, z, y, t=t, r=t, packing=packing)
