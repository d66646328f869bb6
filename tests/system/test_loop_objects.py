"""The small objects of the training loop against golden files of the published code."""

import json

import pytest
import torch
from golden_files import GOLDEN, relative_error
from omegaconf import OmegaConf
from safetensors.torch import load_file
from small_mnist import small
from torch import nn

from tim.objective import TransitionObjective
from tim.training import draws, loop, settings
from tim.training.average import Average
from tim.training.conditioning import ClassConditioning, TextConditioning
from tim.training.latents import Encoded
from tim.training.repa import Targets
from tim.transports import make

FOLDER = GOLDEN / "training"
FACTS = json.loads((FOLDER / "facts.json").read_text())
SCHEDULES = json.loads((FOLDER / "schedules.json").read_text())


@pytest.mark.parametrize("decay", ["0.9", "0.9999"])
def test_average(decay):
    golden = load_file(FOLDER / "average.safetensors")

    def part(name):
        prefix = f"{decay}.{name}."
        return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}

    networks = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)) for _ in range(2)]
    for network in networks:
        network.load_state_dict(part("start"))
    average = Average(networks[0], float(decay))
    for step in range(3):
        networks[1].load_state_dict(part(f"step{step}.network"))
        average.update(networks[1])
        for name, value in part(f"step{step}.average").items():
            assert relative_error(average.network.state_dict()[name], value) < 1e-6


def test_warmup_of_the_average():
    """diffusers' EMAModel: the first step copies."""
    from diffusers.training_utils import EMAModel

    ours, theirs = Average(nn.Linear(2, 2), 0.9, warmup=True), EMAModel([], decay=0.9)
    expected = [theirs.get_decay(step + 1) for step in range(100)]
    assert [ours.decay_at(step) for step in range(100)] == expected
    assert expected[0] == 0 and expected[-1] == 0.9


class Toy(nn.Module):
    """F = mix·x + sin(t)·T + r²·R + y."""

    def __init__(self, golden):
        super().__init__()
        self.golden = golden

    def forward(self, x, t, r, y, return_features=False):
        g = {name: value.to(x.dtype) for name, value in self.golden.items() if "toy" in name}
        F = torch.einsum("oc,bchw->bohw", g["toy.mix"], x)
        t, r, y = (v.to(x.dtype).view(-1, 1, 1, 1) for v in (t, r, y))
        F = F + t.sin() * g["toy.t"] + r**2 * g["toy.r"] + y
        features = x.flatten(2).transpose(1, 2) @ g["toy.head"].T
        return (F, features) if return_features else F


@pytest.mark.parametrize("case", ["plain", "jvp", "mg"])
def test_objective(case):
    golden, facts = load_file(FOLDER / "objective.safetensors"), FACTS[f"objective.{case}"]
    toy = Toy(golden)
    transport = make("OT_FM", **facts["transport"])
    objective = TransitionObjective(
        transport, derivative_type=facts["derivative_type"],
        weight_time_type="sqrt", weight_time_tangent=True,
    )  # fmt: skip
    names = ("x", "z", "y", "features_target")
    given = dict(ema_model=toy, y_null=golden["y_null"], n_diffusion=facts["n_diffusion"])
    losses = objective(
        toy, *(golden[name] for name in names), **given,
        t=golden[f"{case}.t"], r=golden[f"{case}.r"], y_ema=golden["y_ema"],
    )  # fmt: skip
    for name in ("weighted", "projection", "denoising"):
        assert float(getattr(losses, name)) == pytest.approx(facts[name], rel=1e-5), name
    assert losses.terms.shape == (2, len(golden["x"])) and not losses.terms.requires_grad
    assert losses.terms.sum(0).mean() == pytest.approx(facts["denoising"], rel=1e-5)
    dropped = objective(
        toy, *(golden[name] for name in names), **given,
        t=golden[f"{case}.t"], r=golden[f"{case}.r"],
    )  # fmt: skip
    assert (dropped.weighted == losses.weighted) == (case != "mg")


@pytest.mark.parametrize("case", SCHEDULES["schedules"], ids=lambda case: case["name"])
def test_schedules(case):
    run = OmegaConf.create(
        dict(
            lr_scheduler=case["name"], lr_warmup_steps=case["warmup"],
            max_train_steps=case["total"],
            lr_scheduler_params={k: case[k] for k in ("num_cycles", "power") if k in case} or None,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=case["base"])
    schedule, rates = settings.build_schedule(run, optimizer), []
    for _ in case["lr_of_step"]:
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(case["lr_of_step"], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("case", SCHEDULES["scale_lr"])
def test_scaled_learning_rate(case, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Accelerator, "num_processes", case["processes"])
    monkeypatch.setattr(loop.Parallel, "wrap", lambda self, network: network)
    cfg = small(
        scale_lr=True, learning_rate=case["learning_rate"], lr_scheduler="constant",
        learning_rate_base_batch_size=case["base"], lr_warmup_steps=0,
        gradient_accumulation_steps=case["accumulation"],
    )  # fmt: skip
    cfg.data.dataloader.batch_size = case["batch_size"]
    state = loop.Trainer(cfg, tmp_path).state
    assert state.scheduler.get_last_lr() == pytest.approx([case["scaled"]])


def chance(*key):
    return draws.Draws.of(*key, device="cpu")


def test_class_conditioning():
    label = torch.arange(1000) % 7
    found = ClassConditioning(7, 0.25)({"label": label}, chance(0, 0, 0))
    dropped = found.y == 7
    assert 0.2 < dropped.float().mean() < 0.3
    assert torch.equal(found.y[~dropped], label[~dropped])
    assert torch.equal(found.y_ema, label) and (found.y_null == 7).all()
    again, other = (
        ClassConditioning(7, 0.25)({"label": label}, chance(*key)).y for key in ((0, 0, 0), (0, 1))
    )
    assert torch.equal(again, found.y) and not torch.equal(other, found.y)


def encode(texts):
    """Each letter's number; padding is −1, as long as the longest text."""
    longest = max(map(len, texts)) + 1
    rows = [[1.0, *map(float, map(ord, text))] for text in texts]
    return torch.tensor([row + [-1.0] * (longest - len(row)) for row in rows]).unsqueeze(-1)


def test_text_conditioning():
    """ "Nothing" is the empty text, mostly padding, cut to the batch's length."""
    nothing = torch.full((1, 20, 1), -1.0)
    nothing[0, 0] = 1
    captions = ["a fox", "an owl at night"] * 200
    found = TextConditioning(encode, nothing, 0.25)({"caption": captions}, chance(3))
    assert found.y.shape == found.y_null.shape == (400, 16, 1)
    assert torch.equal(found.y_null[5], nothing[0, :16]) and found.y_ema is found.y
    dropped = (found.y == found.y_null).flatten(1).all(1)
    assert 0.2 < dropped.float().mean() < 0.3
    assert torch.equal(found.y[~dropped], encode(captions)[~dropped])
    assert TextConditioning(encode, nothing, 0.0).examples("cpu")[0].shape[0] == 3


def test_targets():
    def encoder(images, grid):
        return images.mean(dim=(1, 2, 3)).view(-1, 1, 1).expand(-1, grid[0] * grid[1], 6)

    images, latents = torch.rand(2, 3, 32, 64), torch.zeros(2, 4, 4, 8)
    assert Targets(encoder, 6, 2)(images, latents).shape == (2, 8, 6)
    with pytest.raises(ValueError, match=r"must give features \(2, 8, 5\), got \(2, 8, 6\)"):
        Targets(encoder, 5, 2)(images, latents)
    with pytest.raises(FloatingPointError, match="the vision encoder's features are not finite"):
        Targets(encoder, 6, 2)(images / 0, latents)


def test_latents_are_encoded_in_float32():
    seen = []

    def autoencoder(images, generator):
        seen.append((images.dtype, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return nn.functional.avg_pool2d(images, 8) + torch.randn((), generator=generator)

    batch = {"image": torch.rand(2, 3, 16, 16)}
    with torch.autocast("cpu", torch.bfloat16):
        first, again = (Encoded(autoencoder)(batch, chance(0, 1)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (2, 3, 2, 2)
    assert seen[0] == (torch.float32, False, False)
