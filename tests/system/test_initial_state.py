"""Everybody who samples starts from σ(T_max) times the noise: 100 times, with VE-SDE."""

import math

import pytest
import torch
from small_mnist import small
from small_pipelines import PROMPTS, class_pipeline, seeded, text_pipeline
from typer.testing import CliRunner

from tim import config
from tim.app import cli, demo
from tim.evaluation import mnist
from tim.models import TiMTransformer2DModel
from tim.training import draws, loop, save_export
from tim.transports import make


@pytest.fixture
def asked(monkeypatch):
    """(state, t) of every call of a network; its answer is zero."""
    calls = []

    def forward(self, x, t, r, y):
        calls.append((x.clone(), t.clone()))
        return torch.zeros_like(x)

    monkeypatch.setattr(TiMTransformer2DModel, "forward", forward)
    return calls


@pytest.fixture
def ve_config():
    cfg = small(seed=5)
    cfg.model.transport = {"target": "tim.schedulers.transports.VE_SDE"}
    return cfg


@pytest.fixture
def exported(ve_config, tmp_path):
    save_export(config.build_network(ve_config), ve_config, tmp_path / "model")
    return tmp_path / "model"


def assert_starts_from(asked, noise):
    """The first question is about 100·noise at t = T_max = 100."""
    state, t = asked[0]
    torch.testing.assert_close(state, 100 * noise)
    torch.testing.assert_close(t, torch.full_like(t, math.log(100 / 2)))


def noise_of(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_class_pipeline(asked):
    class_pipeline(transport="VE_SDE")([1, 7], num_inference_steps=1, generator=seeded())
    assert_starts_from(asked, torch.randn(2, 4, 4, 4, generator=seeded()))


def test_text_pipeline_with_latents_given(asked):
    noise = noise_of(0, 2, 4, 4, 4)
    pipeline = text_pipeline(transport="VE_SDE")
    pipeline(PROMPTS, num_inference_steps=1, latents=noise, output_type="latent")
    assert_starts_from(asked, noise)


def test_tim_sample(asked, exported, tmp_path):
    arguments = ["sample", exported, "--labels", "3,1", "--seed", 2, "--output", tmp_path / "x.png"]
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert_starts_from(asked, noise_of(2, 1, 1, 28, 28))  # picture by picture


def test_demo(asked, exported, tmp_path):
    demo.draw(tmp_path / "demo.png", seed=4, weights=exported)
    assert_starts_from(asked, noise_of(4, 10, 1, 28, 28))


def test_the_sample_grids_of_training(asked, ve_config, tmp_path):
    loop.Trainer(ve_config, tmp_path)._draw_samples()
    noise = torch.randn(10, 1, 28, 28, generator=draws.generator(5))
    assert_starts_from(asked, noise)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 1


def test_evaluation(asked, ve_config):
    network = config.build_network(ve_config)
    mnist.draw(network, make("VE_SDE"), num_steps=1, per_class=1, seed=6)
    assert_starts_from(asked, noise_of(6, 10, 1, 28, 28))
