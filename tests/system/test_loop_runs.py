"""Runs with every part: what they begin with, what they tell, and what an accident leaves."""

import gzip
import importlib.util
import json
import os
import resource
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_latents import latents, parts
from small_mnist import small
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from typer.testing import CliRunner

from tim import checks, config
from tim.app.cli import app
from tim.models import embeddings
from tim.training import load_export, loop, snapshots
from tim.training.log import read_log

WEIGHTS = "diffusion_pytorch_model.safetensors"


pytestmark = pytest.mark.usefixtures("one_thread")


def equal(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def in_child(function) -> int:
    """The wait status of a process that does it."""
    if (pid := os.fork()) == 0:
        status = 1
        tqdm.set_lock(threading.RLock())  # its own is shared with the parent, which waits for it
        try:
            status = function() or 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("mg", [False, True])
def test_every_part(tmp_path, kind, mg):
    """REPA moves the projector, samples are drawn, and a resumed run equals an unbroken one."""
    cfg = latents(kind, mg=mg, gradient_accumulation_steps=2, validation_steps=2)
    whole = loop.train(cfg, tmp_path / "whole", parts=parts(kind))
    cfg.training.max_train_steps = 2
    loop.train(cfg, tmp_path / "resumed", parts=parts(kind))
    cfg.training.max_train_steps = 4
    resumed = loop.train(cfg, tmp_path / "resumed", parts=parts(kind))
    assert equal(whole / WEIGHTS, resumed / WEIGHTS)
    log = read_log(tmp_path / "whole/log.jsonl")
    assert all(line["projection"] > 0 for line in log)
    assert log[0]["loss"] == pytest.approx(log[0]["weighted"] + 0.5 * log[0]["projection"])
    assert len(list((tmp_path / "whole/samples").iterdir())) == 2
    two, four = (
        load_file(tmp_path / f"whole/checkpoints/step-0000000{n}/network" / WEIGHTS) for n in (2, 4)
    )
    assert not torch.equal(two["projector.0.weight"], four["projector.0.weight"])


def test_the_average_sees_labels_before_dropping(tmp_path, monkeypatch):
    trainer, seen = loop.Trainer(latents(mg=True), tmp_path, parts()), []
    trainer._window = loop.Window(trainer.device)
    average = trainer.state.average.network
    forward = type(average).forward

    def noted(self, x, t, r, y, **options):
        seen.append((self is average, y))
        return forward(self, x, t, r, y, **options)

    monkeypatch.setattr(type(average), "forward", noted)
    label = torch.arange(64) % 4
    latent = torch.randn(64, 3, 4, 4)
    trainer._loss({"latent": latent, "image": torch.rand(64, 3, 8, 8), "label": label}, 0)
    (of_average,) = [y for is_average, y in seen if is_average]
    of_network = next(y for is_average, y in seen if not is_average)
    assert torch.equal(of_average, torch.cat((label, torch.full_like(label, 4))))
    assert 0 < (of_network == 4).sum() < 64


def test_without_an_average(tmp_path):
    cfg = small()
    cfg.model.use_ema = False
    folder = loop.train(cfg, tmp_path)
    newest = tmp_path / "checkpoints/step-00000008"
    assert not (newest / "ema").exists()
    assert equal(folder / WEIGHTS, newest / "network" / WEIGHTS)
    cfg.training.max_train_steps = 10
    cfg.model.use_ema = True  # begins with the network
    loop.train(cfg, tmp_path)
    cfg.model.transport.params.enhance_target = True
    cfg.model.use_ema = False
    with pytest.raises(ValueError, match="use_ema must be true for an enhanced target"):
        loop.train(cfg, tmp_path)


def test_starting_from_a_file(tmp_path, caplog):
    trained = loop.train(small(max_train_steps=2), tmp_path / "first")
    weights = {name: torch.randn_like(w) for name, w in load_file(trained / WEIGHTS).items()}
    weights["other.weight"] = torch.ones(1)
    save_file(weights, tmp_path / "mine.safetensors")
    cfg = small(max_train_steps=2, learning_rate=0.0)
    cfg.model.ckpt = str(tmp_path / "mine.safetensors")
    second = load_file(loop.train(cfg, tmp_path / "second") / WEIGHTS)
    for name, value in second.items():
        assert torch.equal(value, weights[name]) == ("delta_embedder" not in name), name
    assert "keeps fresh delta_embedder.mlp.0.weight, " in caplog.text
    assert "does not use delta_embedder" in caplog.text and "and 2 more" in caplog.text
    cfg.model.network.params.hidden_size = 64
    with pytest.raises(ValueError, match="mine.safetensors is of another network: .*, not "):
        loop.train(cfg, tmp_path / "third")


def published(folder, cfg):
    """As accelerate writes it, with two networks that differ."""
    folder.mkdir()
    for seed, name in ((1, "model.safetensors"), (2, "model_1.safetensors")):
        torch.manual_seed(seed)
        save_file(config.build_network(cfg).state_dict(), folder / name)
    return folder


def test_going_on_from_a_published_checkpoint(tmp_path, caplog):
    cfg = small(max_train_steps=10, learning_rate=0.0, checkpointing_steps=8)
    folder = published(tmp_path / "checkpoint-6", cfg)
    cfg.training.resume_from_checkpoint = str(folder)
    cfg.training.optimizer.params.weight_decay = 0.0
    cfg.model.ema_decay = 1.0
    cfg.model.ema_warmup = False
    loop.train(cfg, tmp_path / "run")
    step = tmp_path / "run/checkpoints/step-00000008"
    assert equal(step / "network" / WEIGHTS, folder / "model_1.safetensors")
    assert equal(step / "ema" / WEIGHTS, folder / "model.safetensors")
    log = read_log(tmp_path / "run/log.jsonl")
    assert [line["step"] for line in log] == [8, 10] and log[-1]["images"] == 160
    assert "goes on from" in caplog.text and "checkpoint-6 at step 6, the optimizer" in caplog.text
    cfg.training.max_train_steps = 12
    loop.train(cfg, tmp_path / "run")  # from its own now
    assert [line["step"] for line in read_log(tmp_path / "run/log.jsonl")] == [8, 10, 12]
    cfg.model.network.params.depth = 3
    with pytest.raises(ValueError, match="model_1.safetensors is of another network: blocks.2"):
        loop.train(cfg, tmp_path / "other")


def test_trackers(tmp_path):
    """TensorBoard where it is installed; what is missing is named."""
    for name in ("tensorboard", "wandb", "trackio"):
        if importlib.util.find_spec(name) is None:
            with pytest.raises(ValueError, match=f"{name} needs .*: pip install {name}"):
                loop.Trainer(small(tracker=name), tmp_path)
    if importlib.util.find_spec("tensorboard"):
        loop.train(small(tracker="tensorboard", tracker_project_name="digits"), tmp_path / "t")
        assert list((tmp_path / "t/digits").rglob("events.out.*"))


class Reads(TorchDispatchMode):
    """Counts what makes a host wait for its device."""

    OPS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__ in self.OPS:
            self.found.append(op)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind, mg", [("class", True), ("text", False)])
@pytest.mark.parametrize("derivative", ["dde", "jvp"])
def test_a_step_reads_nothing_from_the_device(tmp_path, monkeypatch, kind, mg, derivative):
    """As on a GPU: there values are not checked, and AdamW is fused or reads the host alone."""
    for module in (checks, embeddings):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    cfg = latents(kind, mg=mg, gradient_accumulation_steps=2)
    cfg.model.transition_loss.derivative_type = derivative
    cfg.training.optimizer.params.fused = True
    trainer = loop.Trainer(cfg, tmp_path, parts(kind))
    trainer._window = loop.Window(trainer.device)
    batches = iter([batch for _, batch in zip(range(4), trainer._loader(), strict=False)])
    trainer._train_step(batches)  # the first checks the vision encoder's features
    with Reads() as reads:
        terms = trainer._train_step(batches)
    assert reads.found == [] and terms.isfinite().all()
    with Reads() as reads:
        terms.sum().item()
    assert reads.found


def test_profile(tmp_path):
    path = tmp_path / "small.yaml"
    config.OmegaConf.save(small(), path)
    result = CliRunner().invoke(
        app, ["train", "--config", str(path), "--output", str(tmp_path / "run"), "--profile"]
    )
    assert result.exit_code == 0, result.output
    with gzip.open(tmp_path / "run/profile/rank-0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"ProfilerStep#3", "ProfilerStep#5", "aten::linear"} <= names


def test_compiled_blocks(tmp_path):
    """The same weights up to rounding, under the same names."""
    cfg = small(max_train_steps=2)
    cfg.model.network.params.depth = 1
    plain, compiled = (
        loop.train(config.override(cfg, [f"training.compile={flag}"]), tmp_path / flag)
        for flag in ("false", "true")
    )
    one, other = load_file(plain / WEIGHTS), load_file(compiled / WEIGHTS)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5)
    cfg.model.transition_loss.derivative_type = "jvp"
    with pytest.raises(ValueError, match="compile must be false for derivative_type jvp"):
        loop.train(config.override(cfg, ["training.compile=true"]), tmp_path / "jvp")


def test_kill_9(tmp_path, monkeypatch):
    """Between two checkpoints, and while one is being written."""
    cfg = latents(max_train_steps=6)
    unbroken = loop.train(cfg, tmp_path / "unbroken", parts=parts())
    train_step, save = loop.Trainer._train_step, torch.save

    def killed_at_5(self, batches):
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, batches)

    def killed_saving(state, path):
        save(state, path)
        if state["step"] == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    for owner, name, deadly in (
        (loop.Trainer, "_train_step", killed_at_5),
        (torch, "save", killed_saving),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, deadly)
            status = in_child(lambda: loop.train(cfg, tmp_path / "killed", parts=parts()) and 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert list(snapshots.complete(tmp_path / "killed/checkpoints")) == [2, 4]
    resumed = loop.train(cfg, tmp_path / "killed", parts=parts())
    assert equal(unbroken / WEIGHTS, resumed / WEIGHTS)
    for name in ("network", "ema"):
        first, second = (
            tmp_path / run / "checkpoints/step-00000006" / name / WEIGHTS
            for run in ("unbroken", "killed")
        )
        assert equal(first, second)


@pytest.mark.parametrize("room, file", [(120_000, f"network/{WEIGHTS}"), (300_000, "state.pt")])
def test_a_full_disk(tmp_path, monkeypatch, room, file):
    """A limit on the size of a file stands for it: the write fails in the middle."""
    cfg = small()
    unbroken = loop.train(cfg, tmp_path / "unbroken")
    train_step = loop.Trainer._train_step

    def filling_up(self, batches):
        if self.step == 7:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        return train_step(self, batches)

    def run():
        try:
            loop.train(cfg, tmp_path / "full")
        except OSError as error:
            return 0 if f"partial-00000008/{file}" in str(error) else 3

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_train_step", filling_up)
        assert in_child(run) == 0
    root = tmp_path / "full/checkpoints"
    assert [path.name for path in root.iterdir()] == ["step-00000004"]
    assert equal(unbroken / WEIGHTS, loop.train(cfg, tmp_path / "full") / WEIGHTS)


@pytest.mark.parametrize("cut", ["state.pt", f"network/{WEIGHTS}"])
def test_a_cut_file(tmp_path, caplog, cut):
    """The last good checkpoint is used, and the damaged one is kept."""
    cfg = small()
    unbroken = load_file(loop.train(cfg, tmp_path) / WEIGHTS)
    path = tmp_path / "checkpoints/step-00000008" / cut
    size = path.stat().st_size
    os.truncate(path, size - 9)
    again = loop.train(cfg, tmp_path)
    assert f"step-00000008 is damaged: {cut} has {size - 9} bytes, not {size}" in caplog.text
    assert "set aside as damaged-step-00000008" in caplog.text
    assert (tmp_path / "checkpoints/damaged-step-00000008" / cut).is_file()
    assert all(torch.equal(unbroken[name], w) for name, w in load_file(again / WEIGHTS).items())
    network, _, _ = load_export(again)
    assert network.config.depth == 2


def test_export(tmp_path):
    loop.train(small(max_train_steps=1), tmp_path)
    checkpoint = tmp_path / "checkpoints/step-00000001"
    for flag, name in (("--average", "ema"), ("--no-average", "network")):
        out = tmp_path / f"{name}.safetensors"
        result = CliRunner().invoke(app, ["export", str(checkpoint), str(out), flag])
        assert result.exit_code == 0, result.output
        assert equal(out, checkpoint / name / WEIGHTS)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "gone"), str(out)])
    assert result.exit_code == 1 and "there is no folder" in result.stderr
