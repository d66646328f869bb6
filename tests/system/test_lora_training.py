"""`training.lora`: adapters of a frozen base train, average, resume and are kept alone."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from small_latents import latents, parts
from small_pipelines import network, package
from torch import nn
from two_processes import (
    assert_same,
    error,
    gradients,
    gradients_of_one,
    in_two_processes,
    state_of,
)
from typer.testing import CliRunner

from tim import config
from tim.app.cli import app
from tim.models.lora import FILE, TARGETS
from tim.objective import TransitionObjective
from tim.training import load_export, loop, merged
from tim.transports import make

WHOLE = "diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of a class and a text network, with a projector, zero nowhere."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("class", "text"):
        with torch.device("meta"):
            params = dict(config.build_network(latents(kind)).config)
        network(params).save_pretrained(folder / kind)
    return folder


def small(bases, kind="class", derivative="dde", checkpointing=False, lora=None, **training):
    lora = {"rank": 2, "alpha": 4.0} | (lora or {})
    cfg = latents(kind, lora=lora, learning_rate=1e-2, **training)
    cfg.model.ckpt = str(bases / kind)
    cfg.model.transition_loss.derivative_type = derivative
    cfg.model.network.params.use_checkpoint = checkpointing
    return cfg


CASES = [("class", "dde", True), ("text", "jvp", True), ("text", "dde", False)]


@pytest.mark.parametrize(("kind", "derivative", "checkpointing"), CASES)
def test_adapters_alone_train_and_resume_exactly(bases, tmp_path, kind, derivative, checkpointing):
    """With dropout, whose draws a resumed run makes again."""
    accumulation = {"gradient_accumulation_steps": 2, "lora": {"dropout": 0.3}}
    cfg = small(bases, kind, derivative, checkpointing, validation_steps=2, **accumulation)
    trainer = loop.Trainer(cfg, tmp_path / "whole", parts(kind))
    state = trainer.state
    start = {n: p.detach().clone() for n, p in state.network.named_parameters()}
    model, whole = trainer.run(), state_of(trainer)

    base = load_file(bases / kind / WHOLE)
    for each in (state.network, state.average.network):
        weights = each.state_dict()
        for name, before in base.items():
            layer, _, what = name.rpartition(".")
            frozen = weights.get(name, weights.get(f"{layer}.base_layer.{what}"))
            assert torch.equal(frozen, before), name
    trainable = {n for n, p in state.network.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trainable)
    for of in ("network", "ema"):
        assert {n for n in start if not torch.equal(start[n], whole[f"{of}.{n}"])} == trainable
    held = sum(p.numel() for group in state.optimizer.param_groups for p in group["params"])
    assert held == sum(p.numel() for p in state.network.parameters() if p.requires_grad)
    frozen = [p for p in state.network.parameters() if not p.requires_grad]
    assert {*map(id, frozen)} <= {*map(id, state.average.network.parameters())}  # once in memory

    cfg.training.max_train_steps = 2
    loop.Trainer(cfg, tmp_path / "resumed", parts(kind)).run()
    cfg.training.max_train_steps = 4
    resumed = loop.Trainer(cfg, tmp_path / "resumed", parts(kind))
    resumed.run()
    assert_same(state_of(resumed), whole)

    checkpoint = tmp_path / "whole/checkpoints/step-00000004"
    files = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    held = {f"{of}/{name}" for of in ("network", "ema") for name in ("config.json", FILE)}
    assert files == held | {"state.pt", "COMPLETE"}
    assert {p.name for p in model.iterdir()} == {FILE, "training.yaml"}
    assert len(list((tmp_path / "whole/samples").iterdir())) == 2


def test_what_a_run_leaves_is_read(bases, tmp_path):
    """By tools of the run, and as the beginning of another."""
    model = loop.train(small(bases, max_train_steps=2), tmp_path / "run", parts=parts())
    trained, transport, cfg = load_export(model)
    trainer = loop.Trainer(cfg, tmp_path / "other", parts())
    checkpoint = tmp_path / "run/checkpoints/step-00000002"
    loop.Checkpoints(tmp_path, trainer.state, trainer.parallel, 1, []).take_from(checkpoint, 4)
    averaged, own = trainer.averaged_network.state_dict(), trained.state_dict()
    assert own.keys() == averaged.keys() and not trained.training
    assert all(torch.equal(own[name], averaged[name]) for name in own)
    trained.unload_lora()
    trained.load_lora_adapter(checkpoint / "ema", adapter_name="default")  # diffusers' own form
    assert all(torch.equal(own[name], now) for name, now in trained.state_dict().items())
    with pytest.raises(ValueError, match=f"holds adapters: .*ema/{FILE} is their file"):
        merged(checkpoint)

    again = loop.Trainer(small(bases, lora={"init_from": str(model)}), tmp_path / "again", parts())
    begun = again.state.network.state_dict()
    assert all(torch.equal(own[name], begun[name]) for name in own)
    with pytest.raises(ValueError, match="of another rank or of other layers: blocks.0.attn"):
        loop.Trainer(small(bases, lora={"init_from": str(model), "rank": 3}), tmp_path, parts())


def test_the_preset_anywhere(tmp_path, monkeypatch):
    """Its base and text encoder are the shipped network's, wherever they are installed."""
    package(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in ("cat", "fox"):
        Image.new("RGB", (40, 30), "blue").save(f"pictures/{name}.png")
        Path(f"pictures/{name}.txt").write_text(f"a {name}")
    short = ["training.max_train_steps=1"]
    done = CliRunner().invoke(app, ["train", "--config", "emoji-lora", *short])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "runs/emoji-lora/model" / FILE).is_file()


def adapted(bases, kind, dropout=0.0):
    """A network with adapters in all layers but the projector's, and one with them merged."""
    with torch.device("meta"):
        params = dict(config.build_network(latents(kind)).config)
    both = [network(params).double() for _ in range(2)]
    names = [n for n, m in both[0].named_modules() if isinstance(m, nn.Linear) and "proj" not in n]
    for model in both:
        torch.manual_seed(0)
        settings = LoraConfig(
            r=2, target_modules=[*names, *TARGETS], lora_dropout=dropout, init_lora_weights=False
        )
        model.requires_grad_(False).add_adapter(settings)
    both[1].fuse_lora()
    both[1].unload_lora()
    return both


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("derivative", ["dde", "jvp"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_derivative_through_adapters(bases, kind, derivative, checkpointing):
    """Loss and dF/dt are those of the network with the adapters in its weights, and the gradient
    of B and A what the chain rule makes of the weights'."""
    model, whole = adapted(bases, kind)
    whole.requires_grad_(True)
    objective = TransitionObjective(make("OT_FM"), derivative_type=derivative)
    items = parts(kind).dataset
    x = torch.stack([items[i]["latent"] for i in range(4)]).double()
    g = torch.Generator().manual_seed(1)
    z = torch.randn(x.shape, generator=g, dtype=torch.float64)
    y = torch.randn(4, 3, 5, generator=g).double() if kind == "text" else torch.arange(4)
    t = torch.tensor([0.9, 0.5, 0.7, 0.3], dtype=torch.float64)
    r = torch.tensor([0.2, 0.5, 0.0, 0.1], dtype=torch.float64)
    found = []
    for each in (model, whole):
        if checkpointing:
            each.enable_gradient_checkpointing()
        each.train()
        dF = objective.derivative(each, x, z, y, t, r)
        loss = objective(each, x, z, y, None, y_null=y, t=t, r=r, n_diffusion=0).weighted
        loss.backward()
        found.append((dF, loss))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-7, atol=1e-9) and found[0][0].any()
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-9)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            dW = whole.get_submodule(name).weight.grad * module.scaling["default"]
            for gradient, expected in ((B.grad, dW @ A.T), (A.grad, B.T @ dW)):
                assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-9), name
            assert module.base_layer.weight.grad is None


def test_a_difference_has_no_dropout(bases):
    """Two draws of it would differ by much more than t does."""
    model, _ = adapted(bases, "class", dropout=0.5)
    objective = TransitionObjective(make("OT_FM"), derivative_type="dde")
    seen = []

    def noted(module, args):
        seen.append((torch.is_grad_enabled(), module.training))

    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    dropouts[0].register_forward_pre_hook(noted)
    g = torch.Generator().manual_seed(1)
    x, z = torch.randn(2, 4, 3, 4, 4, generator=g, dtype=torch.float64)
    t, r = torch.tensor([0.9, 0.5, 0.7, 0.3]).double(), torch.zeros(4).double()
    model.train()
    y = torch.arange(4)
    objective(model, x, z, y, None, y_null=y, t=t, r=r, n_diffusion=0)
    assert {*seen} == {(True, True), (False, False)}
    assert all(module.training for module in dropouts)


def other_base(bases, folder):
    weights = load_file(bases / "class" / WHOLE)
    weights["blocks.0.attn.qkv.bias"] += 1e-3
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / WHOLE)
    return str(folder)


def test_a_run_goes_on_with_its_own_base_and_layers(bases, tmp_path):
    cfg, run = small(bases, max_train_steps=2), tmp_path / "run"
    loop.train(cfg, run, parts=parts())
    cfg.training.max_train_steps = 4
    before = sorted(path for path in run.rglob("*"))
    cfg.training.lora.rank = 3
    with pytest.raises(ValueError, match="cannot go on with training.lora.rank 2 → 3: choose"):
        loop.train(cfg, run, parts=parts())
    cfg.training.lora.rank, cfg.model.ckpt = 2, other_base(bases, tmp_path / "base")
    with pytest.raises(ValueError, match="is of adapters of a base with hash .* see training.lora"):
        loop.train(cfg, run, parts=parts())
    plain = latents(resume_from_checkpoint=str(run / "checkpoints/step-00000002"))
    with pytest.raises(ValueError, match="is of adapters .*, this run of a whole network"):
        loop.train(plain, tmp_path / "plain", parts=parts())
    assert before == sorted(path for path in run.rglob("*"))
    cfg.model.ckpt = str(bases / "class" / WHOLE)  # the same weights, by another way
    loop.train(cfg, run, parts=parts())

    loop.train(latents(max_train_steps=2), tmp_path / "whole", parts=parts())
    cfg.training.resume_from_checkpoint = str(tmp_path / "whole/checkpoints/step-00000002")
    with pytest.raises(ValueError, match="is of a whole network, this run of adapters"):
        loop.train(cfg, tmp_path / "third", parts=parts())


REFUSED = {
    "training.lora.rank must be int, got 2.5": {"rank": 2.5},
    "training.lora: rank must be at least 1, got 0": {"rank": 0},
    "training.lora: alpha must be positive or null, got -1": {"alpha": -1},
    r"training.lora: dropout must be in \[0, 1\), got 1": {"dropout": 1.0},
    r"has no parameter rnak \(did you mean rank\?\)": {"rnak": 4},
    r"target_modules must be names of layers, got \[\]": {"target_modules": []},
    "training.lora.target_modules: Target modules .*attn.to_q.* not found": {
        "target_modules": ["attn.to_q"]
    },
    "no LoRA in nowhere: ": {"init_from": "nowhere"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_are_wrong(bases, tmp_path, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        loop.Trainer(small(bases, lora=REFUSED[message]), tmp_path, parts())
    assert "\n" not in str(caught.value)


def test_what_does_not_go_with_adapters(bases, tmp_path, monkeypatch):
    def refused(message, of=ValueError, **changes):
        cfg = small(bases)
        for key, value in changes.items():
            cfg = config.override(cfg, [f"{key.replace('__', '.')}={value}"])
        with pytest.raises(of, match=message):
            loop.Trainer(cfg, tmp_path, parts())

    refused("model.ckpt must be the weights that training.lora adapts", model__ckpt="null")
    refused("training.parallel must be ddp for training.lora", training__parallel="fsdp2")
    refused("training.lora must be a section or null", training__lora="16")
    order = dict(model__network__params__rope_order="upstream")
    refused("of a network with rope_order grid, not upstream: see model.network", **order)
    refused("does not fit the configuration", model__network__params__hidden_size=32)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "peft" else find(n))
    refused("training.lora needs peft: pip install", ImportError)


def test_a_pipeline_s_folder_and_other_layers(bases, tmp_path):
    """The base may be in a saved pipeline; a pattern names layers, an override the section."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/transformer").symlink_to(bases / "class")
    pattern = r"training.lora.target_modules=blocks\.1\..*fc2"
    cfg = config.override(latents(), [pattern, "training.lora.rank=1"])
    cfg.model.ckpt = str(tmp_path / "pipeline")
    trainer = loop.Trainer(cfg, tmp_path / "run", parts())
    named = trainer.state.network.named_parameters()
    layers = {name.partition(".lora_")[0] for name, _ in named if ".lora_" in name}
    assert layers == {"blocks.1.mlp.fc2", "blocks.1.adaLN_modulation.fc2"}


def test_two_processes_have_the_gradients_of_one(bases, tmp_path):
    cfg = small(bases, "class", "jvp", True, gradient_accumulation_steps=2)
    in_two_processes(tmp_path, lambda rank, folder: _on_two(cfg, rank, folder))
    found = torch.load(tmp_path / "found.pt")
    start, alone = gradients_of_one(cfg, parts(), tmp_path / "one")
    trained = {n for n, g in alone.items() if g is not None}
    assert trained and all(".lora_" in name for name in trained)
    assert_same({n: found["start"][n] for n in start}, start)
    assert error(found["gradients"], {n: alone[n] for n in trained}) < 1e-5
    assert found["resumed"]


def _on_two(cfg, rank: int, folder: Path) -> None:
    """Gradients of the first step, and whether a run that is resumed is as an unbroken one."""
    trainer = loop.Trainer(cfg, folder / "run", parts())
    trainer.run()
    whole = state_of(trainer)
    cfg.training.max_train_steps = 2
    loop.Trainer(cfg, folder / "again", parts()).run()
    cfg.training.max_train_steps = 4
    again = loop.Trainer(cfg, folder / "again", parts())
    again.run()
    now = state_of(again)
    found = {"resumed": all(torch.equal(whole[name], now[name]) for name in whole)}
    found["start"], found["gradients"] = gradients(cfg, parts(), folder / "gradients")
    if rank == 0:
        torch.save(found, folder / "found.pt")
