"""The training loop: exact resume, safe checkpoints, a log without gaps."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_mnist import small

from tim.training import draws, load_export, loop, snapshots
from tim.training.log import LossLog, read_log

WEIGHTS = "diffusion_pytorch_model.safetensors"


pytestmark = pytest.mark.usefixtures("one_thread")


def stop_after(monkeypatch, steps):
    """Make training stop, as by an interrupt, when `steps` steps are done."""
    train_step = loop.Trainer._train_step

    def interrupted(self, batches):
        if self.step == steps:
            raise KeyboardInterrupt
        return train_step(self, batches)

    monkeypatch.setattr(loop.Trainer, "_train_step", interrupted)


def weights(output):
    newest = list(snapshots.complete(output / "checkpoints").values())[-1]
    return {
        "export": load_file(output / "model" / WEIGHTS),
        "network": load_file(newest / "network" / WEIGHTS),
        "ema": load_file(newest / "ema" / WEIGHTS),
    }


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_run_equals_unbroken_run(tmp_path, monkeypatch, accumulation):
    cfg = small(gradient_accumulation_steps=accumulation)
    loop.train(cfg, tmp_path / "unbroken")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 7)
        loop.train(cfg, tmp_path / "resumed")
    assert list(snapshots.complete(tmp_path / "resumed/checkpoints")) == [4]
    loop.train(cfg, tmp_path / "resumed")

    unbroken, resumed = weights(tmp_path / "unbroken"), weights(tmp_path / "resumed")
    for part, tensors in unbroken.items():
        assert resumed[part].keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(resumed[part][name], value), (part, name)

    logs = [read_log(tmp_path / run / "log.jsonl") for run in ("unbroken", "resumed")]
    for line in logs[0] + logs[1]:
        for name in ("images_per_second", "loading_share", "encoding_share"):
            del line[name]
    assert [line["step"] for line in logs[0]] == [2, 4, 6, 8]
    assert logs[0] == logs[1]
    assert logs[0][-1]["images"] == 8 * 16 * accumulation


def test_draws_are_used(tmp_path):
    """Another seed gives other weights: the equality above is not that of constants."""
    loop.train(small(max_train_steps=2), tmp_path / "a")
    loop.train(small(max_train_steps=2, seed=1), tmp_path / "b")
    a, b = weights(tmp_path / "a")["network"], weights(tmp_path / "b")["network"]
    assert not torch.equal(a["x_embedder.proj.weight"], b["x_embedder.proj.weight"])


def test_loss_falls_and_export_is_the_average(tmp_path):
    loop.train(small(max_train_steps=120, log_steps=20, learning_rate=3e-3), tmp_path)
    log = read_log(tmp_path / "log.jsonl")
    assert log[-1]["denoising"] < 0.8 * log[0]["denoising"]
    assert log[-1]["instant"] < 0.8 * log[0]["instant"]
    for line in log:
        assert line["squared"] + line["cosine"] == pytest.approx(line["denoising"], rel=1e-5)

    network, transport, cfg = load_export(tmp_path / "model")
    ema = weights(tmp_path)["ema"]
    raw = weights(tmp_path)["network"]
    exported = network.state_dict()
    assert all(torch.equal(exported[name], ema[name]) for name in ema)
    assert not torch.equal(raw["final_layer.linear.weight"], ema["final_layer.linear.weight"])
    assert cfg.training.max_train_steps == 120
    assert (tmp_path / "samples" / "step-00000120.png").is_file()


def test_incomplete_checkpoint_is_ignored(tmp_path):
    cfg = small()
    loop.train(cfg, tmp_path)
    before = weights(tmp_path)["network"]
    broken = tmp_path / "checkpoints" / "step-00000012"
    broken.mkdir()
    (broken / "state.pt").write_bytes(b"half")
    (tmp_path / "checkpoints" / "partial-00000010").mkdir()
    loop.train(cfg, tmp_path)
    after = weights(tmp_path)["network"]
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_checkpoints_are_refused_unless_resuming(tmp_path):
    loop.train(small(max_train_steps=1), tmp_path)
    with pytest.raises(FileExistsError, match="resume_from_checkpoint=latest"):
        loop.train(small(max_train_steps=1, resume_from_checkpoint=None), tmp_path)


def test_old_checkpoints_go_only_when_the_new_one_is_complete(tmp_path):
    def write(folder):
        (folder / "state.pt").write_text("state")

    for step in (1, 2, 3, 4):
        snapshots.save(tmp_path, step, write, keep=2, keep_steps=[1])
    assert list(snapshots.complete(tmp_path)) == [1, 3, 4]

    def fail(folder):
        assert list(snapshots.complete(tmp_path)) == [1, 3, 4]
        write(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        snapshots.save(tmp_path, 5, fail, keep=2)
    assert list(snapshots.complete(tmp_path)) == [1, 3, 4]
    snapshots.save(tmp_path, 6, write, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", ["image", "loss"])
def test_non_finite_values_stop_the_run(tmp_path, monkeypatch, broken, value):
    """An image is the harder case: the objective maps NaN losses to 0, only the gradient tells."""
    loss_of = loop.Trainer._loss

    def spoilt(self, batch, images_seen):
        if self.step == 5 and broken == "image":
            batch["image"][3, 0, 7, 7] = value
        loss, terms = loss_of(self, batch, images_seen)
        if self.step == 5 and broken == "loss":
            terms = terms * value
        return loss, terms

    monkeypatch.setattr(loop.Trainer, "_loss", spoilt)
    with pytest.raises(FloatingPointError, match="not finite at step 6"):
        loop.train(small(), tmp_path)
    assert list(snapshots.complete(tmp_path / "checkpoints")) == [4]
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [2, 4]


def test_unknown_precision_and_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mixed_precision .* got 'fp8'"):
        loop.train(small(mixed_precision="fp8"), tmp_path)
    cfg = small()
    cfg.data.data_type = "pictures"
    with pytest.raises(ValueError, match="data_type must be one of mnist, .* got 'pictures'"):
        loop.train(cfg, tmp_path)


def test_image_stream_resumes_shards_and_covers_each_epoch():
    def first(count, **kwargs):
        stream = iter(draws.ImageStream(10, 4, seed=3, **kwargs))
        return [next(stream) for _ in range(count)]

    flat = sum(first(5), [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert first(2, start=12) == first(5)[3:]
    ranks = [first(2, rank=rank, world_size=2) for rank in (0, 1)]
    assert [ranks[0][0], ranks[1][0], ranks[0][1], ranks[1][1]] == first(4)


def test_log_drops_later_and_torn_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "lo')
    LossLog(path, 2).append({"step": 3, "loss": 0.5})
    assert read_log(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]
