"""`training.lora`: adapters of a frozen base train, average, resume and are kept alone."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from small_latents import latents, parts
from small_pipelines import network
from two_processes import assert_same, in_two_processes, state_of

from tim.models import TiMTransformer2DModel
from tim.models.lora import FILE
from tim.objective import TransitionObjective
from tim.training import load_export, loop, merged
from tim.transports import make

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folder of a network of a kind, with a projector, zero nowhere."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("class", "text"):
        from tim import config

        network(config.build_network(latents(kind)).config).save_pretrained(folder / kind)
    return folder


def small(bases, kind="class", rank=2, derivative="dde", checkpointing=False, **training):
    lora = {"rank": rank, "alpha": 4.0, **training.pop("lora", {})}
    cfg = latents(kind, lora=lora, learning_rate=1e-2, **training)
    cfg.model.ckpt = str(bases / kind)
    cfg.model.transition_loss.derivative_type = derivative
    cfg.model.network.params.use_checkpoint = checkpointing
    return cfg


def names(network):
    return {name for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize(("derivative", "checkpointing"), [("dde", True), ("jvp", True), ("jvp", False)])
def test_adapters_alone_train_and_resume_exactly(bases, tmp_path, kind, derivative, checkpointing):
    cfg = small(bases, kind, derivative=derivative, checkpointing=checkpointing, lora={"dropout": 0.2},
                gradient_accumulation_steps=2, validation_steps=2)
    trainer = loop.Trainer(cfg, tmp_path / "whole", parts(kind))
    base = load_file(bases / kind / "diffusion_pytorch_model.safetensors")
    trainer.run()
    whole = state_of(trainer)
    trainable = names(trainer.state.network)
    assert trainable and all(".lora_" in name for name in trainable)
    now = trainer.state.network.state_dict()
    for name, before in base.items():
        layer, _, kind_of = name.rpartition(".")
        assert torch.equal(now.get(name, now.get(f"{layer}.base_layer.{kind_of}")), before)
