"""A run that is resumed otherwise than it began, stopped by a signal, started twice, or damaged."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from small_mnist import small

from tim import config
from tim.training import Stopped, loop, signals, snapshots
from tim.training.log import read_log


def test_another_batch_size(tmp_path, caplog):
    """The count of images goes on, and so does the learning rate, scaled by the new batch."""
    cfg = small(scale_lr=True, learning_rate_base_batch_size=16, lr_scheduler="constant")
    loop.train(cfg, tmp_path)
    cfg.data.dataloader.batch_size = 4
    cfg.training.max_train_steps = 12
    loop.train(cfg, tmp_path)
    log = read_log(tmp_path / "log.jsonl")
    assert [line["images"] for line in log] == [32, 64, 96, 128, 136, 144]
    assert [line["lr"] for line in log[-3:]] == pytest.approx([1e-3, 0.25e-3, 0.25e-3])
    assert "goes on from step 8 with " in caplog.text
    assert "data.dataloader.batch_size 16 → 4" in caplog.text
    assert config.load(tmp_path / "config.yaml").data.dataloader.batch_size == 4


def test_another_schedule(tmp_path):
    loop.train(small(), tmp_path)
    cfg = small(max_train_steps=20, lr_scheduler="linear", learning_rate=4e-3, lr_warmup_steps=0)
    loop.train(cfg, tmp_path)
    lr = {line["step"]: line["lr"] for line in read_log(tmp_path / "log.jsonl")}
    assert lr[8] == 1e-3 and lr[10] == pytest.approx(2e-3) and lr[20] == 0


def test_a_checkpoint_without_a_count_of_images(tmp_path):
    loop.train(small(max_train_steps=4), tmp_path)
    path = tmp_path / "checkpoints/step-00000004/state.pt"
    state = torch.load(path, weights_only=True)
    del state["images"]
    torch.save(state, path)
    loop.train(small(), tmp_path)
    assert read_log(tmp_path / "log.jsonl")[-1]["images"] == 8 * 16


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(depth=3), "is of a network with depth 2, not 3"),
        (dict(rope_order="upstream", hidden_size=64), "hidden_size 32, not 64, rope_order grid"),
    ],
)
def test_another_network_is_refused(tmp_path, change, said):
    loop.train(small(max_train_steps=1), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    cfg = small(max_train_steps=2)
    cfg.model.network.params.update(change)
    with pytest.raises(ValueError, match=said):
        loop.train(cfg, tmp_path)
    assert {path: path.read_bytes() for path in before} == before


def test_another_seed_is_refused(tmp_path):
    loop.train(small(max_train_steps=1), tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"cannot go on with training.seed 0 → 1: choose another"):
        loop.train(small(max_train_steps=2, seed=1), tmp_path)
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    loop.train(small(max_train_steps=4), tmp_path)
    with pytest.raises(ValueError, match="max_train_steps must be at least 4, .* got 3"):
        loop.train(small(max_train_steps=3), tmp_path)


@pytest.mark.parametrize("name", ["state.pt", "ema/diffusion_pytorch_model.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    loop.train(small(max_train_steps=1), tmp_path)
    path = tmp_path / "checkpoints/step-00000001" / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="step-00000001 is damaged"):
        loop.train(small(max_train_steps=2), tmp_path)


@pytest.mark.parametrize(
    "damage",
    [b"\0" * 9 + b"\n", b"<<<<< HEAD\n", b"[1]\n", b'{"loss": 1}\n', b"\xff\xfe\n", b'{"step": 9'],
)
def test_a_damaged_log(tmp_path, caplog, damage):
    loop.train(small(max_train_steps=4), tmp_path)
    path = tmp_path / "log.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(second + first + b"\n" + first + damage)  # out of order and doubled, too
    loop.train(small(), tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert f"{path}: left out what is no record, line 5" in caplog.text


def test_no_clipping(tmp_path, monkeypatch):
    """max_grad_norm 0 clips nothing, as in published files."""
    norms = []
    step = torch.optim.AdamW.step

    def noted(self, *args, **options):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(g for g in grads if g is not None)))
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    loop.train(small(max_train_steps=1, max_grad_norm=0), tmp_path)
    assert norms == pytest.approx([read_log(tmp_path / "log.jsonl")[0]["grad_norm"]])
    assert norms[0] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step(tmp_path, monkeypatch, number):
    cfg, train_step, handlers = small(), loop.Trainer._train_step, signals.SIGNALS
    loop.train(cfg, tmp_path / "unbroken")
    before = [signal.getsignal(one) for one in handlers]

    def told(self, batches):
        if self.step == 4:
            os.kill(os.getpid(), number)
        return train_step(self, batches)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="at step 5") as stop:
        patch.setattr(loop.Trainer, "_train_step", told)
        loop.train(cfg, tmp_path / "stopped")
    assert stop.value.exit_code == 128 + number
    assert [signal.getsignal(one) for one in handlers] == before
    assert list(snapshots.complete(tmp_path / "stopped/checkpoints")) == [4, 5]
    folders = [loop.train(cfg, tmp_path / name) for name in ("unbroken", "stopped")]
    one, other = (
        (folder / "diffusion_pytorch_model.safetensors").read_bytes() for folder in folders
    )
    assert one == other


def test_a_second_interrupt_ends_at_once():
    with signals.noted() as received:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert received == [signal.SIGINT]


def test_ignored_signals_stay_ignored():
    """As nohup and a shell's & leave them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.noted() as received:
            os.kill(os.getpid(), signal.SIGINT)
        assert received == []
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_to_the_whole_group(tmp_path):
    """As Slurm sends it, to the process that loads the data too."""
    cfg = small(max_train_steps=10**6, checkpointing_steps=10**6)
    cfg.data.dataloader.num_workers = 1
    path, output = tmp_path / "mine.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(config.resolved(cfg)))
    command = [sys.executable, "-m", "tim", "train", "--config", path, "--output", output]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        log = output / "log.jsonl"
        while process.poll() is None and not (log.is_file() and log.stat().st_size):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 143, said
    (step,) = snapshots.complete(output / "checkpoints")
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"SIGTERM stopped the run at step {step}, whose checkpoint is written")
    assert "Traceback" not in said


@pytest.mark.parametrize("error", [RuntimeError, ConnectionResetError, EOFError])
@pytest.mark.parametrize("is_signal", [True, False])
def test_the_loader_ended_while_it_hands_over(tmp_path, monkeypatch, error, is_signal):
    """By the group's signal, which then ends the run; else the error does."""
    train_step = loop.Trainer._train_step

    def ended(self, batches):
        if self.step == 2:
            if is_signal:
                os.kill(os.getpid(), signal.SIGTERM)
            raise error("the loader is gone")
        return train_step(self, batches)

    monkeypatch.setattr(loop.Trainer, "_train_step", ended)
    monkeypatch.setattr(loop.time, "sleep", lambda _: None)
    said = "SIGTERM stopped the run at step 2" if is_signal else "the loader is gone"
    with pytest.raises(Stopped if is_signal else error, match=said):
        loop.train(small(max_train_steps=5, checkpointing_steps=100), tmp_path)
    assert list(snapshots.complete(tmp_path / "checkpoints")) == [2] * is_signal


def test_a_folder_is_one_run_s(tmp_path, monkeypatch):
    """Refused before anything is written; a run that is over, however it ended, leaves no lock."""
    train_step = loop.Trainer._train_step

    def again(self, batches):
        with pytest.raises(BlockingIOError, match=f"is being written to by process {os.getpid()}"):
            loop.Trainer(small(seed=5), tmp_path).run()
        assert config.load(tmp_path / "config.yaml").training.seed == 0
        monkeypatch.setattr(loop.Trainer, "_train_step", train_step)
        raise KeyError("crash")

    monkeypatch.setattr(loop.Trainer, "_train_step", again)
    with pytest.raises(KeyError):
        loop.train(small(max_train_steps=1), tmp_path)
    loop.train(small(max_train_steps=1), tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    loop.train(small(max_train_steps=1), tmp_path)
    assert f"has no locks ({os.strerror(number)})" in caplog.text
