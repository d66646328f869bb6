"""share_primal: one dual forward for F and dF/dt gives the loss of two, for less work."""

import pytest
import torch
from eager import randomise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tim.models import TiMTransformer2DModel
from tim.objective import TransitionObjective
from tim.transports import TRANSPORTS, make
from tim_kernels import use_backend

TINY = dict(
    patch_size=1, in_channels=3, hidden_size=16, encoder_depth=1, depth=2, num_heads=2,
    num_classes=4, z_dim=6, projector_dim=8, lora_hidden_size=8,
)  # fmt: skip
BATCH, N_DIFFUSION = 6, 2


def problem(dtype=torch.float32, text=False, batch=BATCH, n_diffusion=N_DIFFUSION, h=2, w=4):
    model = randomise(TiMTransformer2DModel(**TINY | dict(cap_feat_dim=5 if text else None)))
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, batch, 3, h, w, generator=g, dtype=dtype)
    y = torch.randn(batch, 3, 5, generator=g, dtype=dtype) if text else torch.arange(batch) % 4
    features = torch.randn(batch, h * w, 6, generator=g, dtype=dtype)
    t = torch.linspace(0.3, 0.9, batch)
    r = torch.where(torch.arange(batch) < n_diffusion, t, t / 2)
    return model.to(dtype), x, z, y, features, t, r


def objective(share_primal, transport="OT_FM", **options):
    return TransitionObjective(
        make(transport), derivative_type="jvp", share_primal=share_primal, **options
    )


def loss_and_gradients(model, criterion, x, z, y, features, t, r, n_diffusion=N_DIFFUSION):
    model.zero_grad()
    loss = criterion(model, x, z, y, features, t=t, r=r, n_diffusion=n_diffusion)
    (loss.weighted + loss.projection).backward()
    named = ((n, p.grad) for n, p in model.named_parameters())
    return loss, {name: g.clone() for name, g in named if g is not None}


def assert_equal(shared, separate, tolerance):
    for ours, theirs in zip(shared[0], separate[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    assert shared[1].keys() == separate[1].keys()
    largest = max(g.norm() for g in separate[1].values())
    for name, gradient in separate[1].items():
        scale = max(gradient.norm(), 1e-3 * largest)
        assert (shared[1][name] - gradient).norm() < tolerance * scale, name


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_transport(transport):
    model, *batch = problem(torch.float64)
    shared, separate = (
        loss_and_gradients(model, objective(share, transport), *batch) for share in (True, False)
    )
    assert_equal(shared, separate, 1e-12)


@pytest.mark.parametrize("backend, text, checkpointing", [
    ("reference", False, False), ("reference", False, True), ("reference", True, True),
    ("triton", False, False), ("triton", True, True),
])  # fmt: skip
def test_backends_and_gradient_checkpointing(backend, text, checkpointing):
    small = dict(batch=3, n_diffusion=1, h=1) if backend == "triton" else {}  # it is interpreted
    model, *batch = problem(text=text, **small)
    n_diffusion = small.get("n_diffusion", N_DIFFUSION)
    separate = loss_and_gradients(model, objective(False), *batch, n_diffusion)
    if checkpointing:
        model.enable_gradient_checkpointing()
    with use_backend(backend):
        shared = loss_and_gradients(model, objective(True), *batch, n_diffusion)
    assert_equal(shared, separate, 2e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_autocast(checkpointing):
    """In bfloat16 the two routes round differently; both stay as close to float32."""
    model, *batch = problem()
    exact = loss_and_gradients(model, objective(False), *batch)
    if checkpointing:
        model.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        shared = loss_and_gradients(model, objective(True), *batch)
    assert_equal(shared, exact, 0.1)


@pytest.mark.parametrize("n_diffusion", [0, 1, BATCH])
def test_any_share_of_samples_without_derivative(n_diffusion):
    model, x, z, y, features, t, r = problem(torch.float64)
    r = torch.where(torch.arange(BATCH) < n_diffusion, t, t / 2)
    shared, separate = (
        loss_and_gradients(model, objective(share), x, z, y, features, t, r, n_diffusion)
        for share in (True, False)
    )
    assert_equal(shared, separate, 1e-12)


def test_dropped_features_and_enhanced_target():
    model, x, z, y, features, t, r = problem(torch.float64)
    ema, _, *_ = problem(torch.float64)
    transport = make("OT_FM", enhance_target=True, w_gt=1.0, w_cond=0.75, w_start=0.3, w_end=0.8)
    losses = [
        TransitionObjective(transport, derivative_type="jvp", share_primal=share)(
            model, x, z, y, None, ema, torch.full_like(y, 4), t, r, N_DIFFUSION
        )
        for share in (True, False)
    ]
    for ours, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_it_saves_one_forward_of_the_samples_with_a_derivative():
    model, x, z, y, _, t, r = problem()

    def flops(function, *args):
        with FlopCounterMode(display=False) as counter:
            function(*args)
        return counter.get_total_flops()

    def call(criterion):
        return criterion(model, x, z, y, t=t, r=r, n_diffusion=N_DIFFUSION)

    separate, shared = (flops(call, objective(share)) for share in (False, True))
    rest = slice(N_DIFFUSION, None)
    forward = flops(model, x[rest], t[rest], r[rest], y[rest])
    assert forward > 0 and abs(separate - shared - forward) < 1e-3 * forward


class Wrapped(nn.parallel.DistributedDataParallel):
    """Looks wrapped; counts the samples that go through it."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module, self.samples = module, []

    def forward(self, x, *args, **kwargs):
        self.samples.append(len(x))
        return self.module(x, *args, **kwargs)


def test_a_wrapped_model_sees_a_forward():
    """DistributedDataParallel would not make gradients equal without: then nothing is shared."""
    model, x, z, y, _, t, r = problem()
    for n_diffusion, expected in ((N_DIFFUSION, [N_DIFFUSION]), (0, [BATCH])):
        wrapped = Wrapped(model)
        loss = objective(True)(wrapped, x, z, y, t=t, r=r, n_diffusion=n_diffusion)
        assert wrapped.samples == expected
        torch.testing.assert_close(
            loss, objective(False)(model, x, z, y, t=t, r=r, n_diffusion=n_diffusion)
        )


def test_refuses_a_difference():
    with pytest.raises(ValueError, match="share_primal needs derivative_type \"jvp\", got 'dde'"):
        TransitionObjective(make("OT_FM"), share_primal=True)
