"""Two processes (gloo) train as one does, by DistributedDataParallel and FSDP2, and share their
checkpoints with it."""

import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from small_latents import latents, parts
from two_processes import (
    assert_same,
    error,
    gradients,
    gradients_of_one,
    in_two_processes,
    state_of,
)

from tim.training import Stopped, loop, merged, snapshots
from tim.training.log import read_log

WEIGHTS = "diffusion_pytorch_model.safetensors"
CASES = [  # conditioning, enhanced target, derivative, block checkpointing
    ("class", True, "dde", False),
    ("class", False, "jvp", True),
    ("text", False, "dde", True),
    ("text", True, "jvp", False),
]
RUN = CASES[0]
WAYS = {"ddp": {}, "fsdp2": {}, "hsdp": {"parallel": "fsdp2", "fsdp_group_size": 1}}

BOTH = [(case, way) for case in CASES for way in WAYS if way != "hsdp" or case == RUN]


def configuration(case, way="ddp", depth=1, **training):
    kind, mg, derivative, checkpointing = case
    sharing = {"parallel": way} | WAYS[way]
    cfg = latents(kind, mg=mg, gradient_accumulation_steps=2, **sharing, **training)
    cfg.model.transition_loss.derivative_type = derivative
    cfg.model.network.params.depth = depth
    cfg.model.network.params.use_checkpoint = checkpointing
    return cfg


def train(cfg, output):
    trainer = loop.Trainer(cfg, output, parts())
    trainer.run()
    return state_of(trainer)


def resumed(cfg, output):
    """The state that a run would go on from."""
    trainer = loop.Trainer(cfg, output, parts())
    trainer._resume()
    return state_of(trainer)


def work(rank: int, folder: Path):
    found = {}
    for case, way in BOTH:
        cfg = configuration(case, way, depth=2)
        found[case, way] = gradients(cfg, parts(case[0]), folder / "none")
    loop.SAMPLE_STEPS = (1,)
    for way in WAYS:
        found["unbroken", way] = train(configuration(RUN, way), folder / f"unbroken-{way}")
        if way == "hsdp":
            continue
        train(configuration(RUN, way, max_train_steps=2), folder / f"resumed-{way}")
        found["resumed", way] = train(configuration(RUN, way), folder / f"resumed-{way}")
    for way in ("ddp", "fsdp2"):
        found["from one", way] = resumed(configuration(RUN, way), folder / "one")
        found["from published", way] = resumed(
            configuration(RUN, way, resume_from_checkpoint=str(folder / "checkpoint-3")),
            folder / "none",
        )
    found["from ddp", "fsdp2"] = resumed(configuration(RUN, "fsdp2"), folder / "unbroken-ddp")

    cfg, place = configuration(RUN, "fsdp2", max_train_steps=10), folder / "stopped"
    cfg.training.checkpointing_steps = 10
    train_step = loop.Trainer._train_step

    def told(self, batches):
        if self.step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batches)

    loop.Trainer._train_step = told
    try:
        train(cfg, place)
    except Stopped as stop:
        found["stopped"] = str(stop)
    loop.Trainer._train_step = train_step

    if rank == 0:
        for name in ("cut", "full"):
            shutil.copytree(folder / "unbroken-fsdp2", folder / name)
        shard = max((folder / "cut/checkpoints/step-00000004/sharded").glob("*.distcp"))
        os.truncate(shard, shard.stat().st_size - 5)
    dist.barrier()
    found["cut"] = resumed(configuration(RUN, "fsdp2"), folder / "cut")

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        train(configuration(RUN, "fsdp2", max_train_steps=6), folder / "full")
    except OSError as error:
        found["full"] = str(error)
    if rank == 0:
        torch.save(found, folder / "found.unfinished")
        os.rename(folder / "found.unfinished", folder / "found.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With what one process made and two processes found."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    torch.save(train(configuration(RUN), folder / "one"), folder / "one.pt")
    step = folder / "one/checkpoints/step-00000002"
    (folder / "checkpoint-3").mkdir()
    for name, part in (("model", "ema"), ("model_1", "network")):
        save_file(merged(step, part == "ema"), folder / f"checkpoint-3/{name}.safetensors")
    in_two_processes(folder, work)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("case, way", BOTH, ids=str)
def test_gradients_are_those_of_one_process(found, tmp_path, case, way):
    """After accumulation; the networks begin equal to the bit, though one was built on meta."""
    start, gradient = found[case, way]
    expected_start, expected = gradients_of_one(
        configuration(case, depth=2), parts(case[0]), tmp_path
    )
    assert_same(start, expected_start)
    assert error(gradient, expected) < 1e-5
    assert all(g.norm() > 0 for name, g in expected.items() if "final_layer.linear" in name)


@pytest.mark.parametrize("way", WAYS)
def test_resumed_runs_equal_unbroken_ones(folder, found, way):
    if way != "hsdp":
        assert_same(found["resumed", way], found["unbroken", way])
        log = read_log(folder / f"resumed-{way}/log.jsonl")
        assert [line["step"] for line in log] == [2, 4]
    assert found["unbroken", way]["counts"].tolist() == [4, 64, 8, 4]
    steps = snapshots.complete(folder / f"unbroken-{way}/checkpoints")
    assert list(steps) == [2, 4]
    assert (steps[4] / "sharded").exists() == (way != "ddp")
    assert (folder / f"unbroken-{way}/samples/step-00000004.png").is_file()
    assert error(found["unbroken", way], found["unbroken", "ddp"]) < 1e-4


@pytest.mark.parametrize("way", ["fsdp2", "hsdp"])
def test_a_sharded_checkpoint_in_one_process(folder, found, way):
    """To the bit, as weights under the published names and as the state of a run."""
    place = folder / f"unbroken-{way}"
    state = found["unbroken", way]
    assert_same(resumed(configuration(RUN), place), state)
    step = snapshots.complete(place / "checkpoints")[4]
    for average, prefix in ((True, "ema."), (False, "network.")):
        names = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        assert_same(merged(step, average), names)
    assert_same(load_file(place / "model" / WEIGHTS), merged(step))


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_a_checkpoint_of_one_process_in_two(folder, found, way):
    one = torch.load(folder / "one.pt")
    assert_same(found["from one", way], one)
    at_two = resumed(
        configuration(RUN, resume_from_checkpoint=str(folder / "checkpoint-3")), folder / "none"
    )
    weights = {n: v for n, v in at_two.items() if n.startswith(("network.", "ema."))}
    given = found["from published", way]
    assert_same({n: given[n] for n in weights}, weights)
    assert given["counts"].tolist() == [3, 48, 3, 3]


def test_shards_from_a_whole_checkpoint(found):
    assert_same(found["from ddp", "fsdp2"], found["unbroken", "ddp"])


def test_a_signal_to_one_process_stops_both(folder, found):
    assert found["stopped"].startswith("SIGTERM stopped the run at step 4, whose checkpoint is")
    assert list(snapshots.complete(folder / "stopped/checkpoints")) == [4]


def test_a_cut_shard(folder, found):
    """The checkpoint before is used by all."""
    assert found["cut"]["counts"].tolist() == [2, 32, 4, 2]
    assert list(snapshots.complete(folder / "cut/checkpoints")) == [2]
    assert (folder / "cut/checkpoints/damaged-step-00000004/sharded").is_dir()


def test_a_disk_that_is_full_for_one_process(folder, found):
    assert "partial-00000006 cannot be written: " in found["full"]
    assert "File too large" in found["full"]
    assert sorted(path.name for path in (folder / "full/checkpoints").iterdir()) == [
        "step-00000002", "step-00000004",
    ]  # fmt: skip


def test_groups_that_do_not_divide(tmp_path, monkeypatch):
    trainer = loop.Trainer(configuration(RUN), tmp_path, parts())
    trainer.parallel.processes = 4
    with pytest.raises(ValueError, match="fsdp_group_size must divide the 4 processes, got 3"):
        trainer.parallel._mesh(3)
