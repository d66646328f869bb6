"""The commands, end to end on a network of a few weights."""

import os
import runpy
import subprocess
import sys
from functools import partial

import pytest
import torch
from PIL import Image
from small_mnist import NETWORK, small
from typer.testing import CliRunner

from tim import config, transports
from tim.app import assets, common, demo
from tim.app.cli import app
from tim.images import captioned, labelled_grid, step_grid
from tim.training import load_export, save_export
from tim_kernels import use_backend


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    cfg = small()
    torch.manual_seed(0)
    network = config.build_network(cfg)
    final = network.final_layer  # zero at initialisation, when no input matters
    for weight in (final.linear.weight, final.adaLN_modulation.fc2.weight):
        torch.nn.init.normal_(weight)
    save_export(network, cfg, folder)
    return folder


def tim(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_python_m_tim_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["-m", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tim", run_name="__main__")
    assert ended.value.code == 0
    help_text = capsys.readouterr().out
    assert "Usage: tim" in help_text and "demo" in help_text and "train" in help_text


def test_train_takes_overrides_and_resumes(tmp_path):
    overrides = [f"model.network.params.{name}={value}" for name, value in NETWORK.items()]
    overrides += ["data.dataloader.batch_size=4"]
    command = ["train", "--config", "mnist", "--output", tmp_path, *overrides]
    for steps in (1, 2):
        result = tim(*command, f"training.max_train_steps={steps}")
        assert result.exit_code == 0, result.output
        assert f"network: {tmp_path / 'model'}" in result.output
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_train_refuses_a_misspelt_override(tmp_path):
    result = tim("train", "--config", "mnist", "--output", tmp_path, "training.max_steps=1")
    assert result.exit_code == 1
    assert "max_steps" in result.output


@pytest.mark.parametrize(
    "command", [["demo"], ["sample", "exported", "--labels", "1", "--output", "x.png"]]
)
def test_a_backend_that_cannot_run_here(exported, tmp_path, monkeypatch, command):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.chdir(tmp_path)
    command = [exported if word == "exported" else word for word in command]
    with use_backend("triton"):
        result = tim(*command, *(["--device", "cpu"] if command[0] == "sample" else []))
    assert result.exit_code == 2
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("error: backend 'triton' cannot run ") and "it needs a CUDA" in line
    assert line.endswith("TIM_KERNELS_BACKEND=auto takes what this machine has")
    assert not list(tmp_path.glob("*.png"))


def test_a_backend_that_there_is_not():
    run = subprocess.run(
        [sys.executable, "-m", "tim", "demo"], capture_output=True, text=True,
        env=os.environ | {"TIM_KERNELS_BACKEND": "trition"},
    )  # fmt: skip
    assert run.returncode == 2
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: TIM_KERNELS_BACKEND must be one of auto, reference, triton")
    assert "Traceback" not in run.stderr


def test_demo_draws_every_step_count(exported, tmp_path):
    path = demo.draw(tmp_path / "demo.png", weights=exported)
    picture = Image.open(path)
    assert picture.height > 5 * 28 and picture.width > 10 * 28


def test_demo_without_weights_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="training.yaml"):
        demo.draw(tmp_path / "demo.png", weights=tmp_path)


def test_grid_puts_images_in_order_on_white():
    black, white = torch.full((1, 1, 4, 4), -1.0), torch.full((1, 1, 4, 4), 1.0)
    rows = {"1 step": torch.cat([black, white]), "2 steps": torch.cat([white, black])}
    grid = labelled_grid(rows, ["0", "1"], scale=1, gap=2).convert("L")
    left, top = grid.width - 12, grid.height - 12
    tiles = [[grid.getpixel((left + dx, top + dy)) for dx in (1, 7)] for dy in (1, 7)]
    assert tiles == [[0, 255], [255, 0]]


def test_names_that_are_wider_than_pictures_have_rows():
    """And the pictures are the same."""
    y, noise = torch.arange(2), torch.randn(2, 1, 28, 28)
    make = partial(step_grid, load_export(assets.folder("mnist"))[0], transports.make("OT_FM"))
    across, down = (
        make(noise, y, (1, 2, 4), names) for names in (["0", "1"], ["a picture of zero", "one"])
    )
    tiles = 2 * 28 + 4
    tall, wide = ((grid.height // tiles, grid.width // tiles) for grid in (across, down))
    assert tall[0] == 3 and wide[0] == 2 and wide[1] > 3
    first_row = across.crop((across.width - 2 * tiles, 26, across.width - tiles - 4, 26 + 56))
    corner = down.crop((down.width - 3 * tiles, 26, down.width - 2 * tiles - 4, 26 + 56))
    assert first_row.tobytes() == corner.tobytes()


def test_captioned_pictures_stand_in_order_over_their_captions():
    sides = [Image.new("L", (48, 24), level) for level in (0, 100, 200)]
    sheet = captioned(sides, ["a", "b", "a caption of some more words than fit on one line"], 2)
    grey = sheet.convert("L")
    left, right = 8 + 48, 8 + 104 + 48
    below = next(y for y in range(60, sheet.height) if grey.getpixel((left, y)) == 200)
    assert [grey.getpixel((left, 8 + 24)), grey.getpixel((right, 8 + 24))] == [0, 100]
    assert grey.getpixel((right, below + 24)) == 255  # nothing stands there
    assert min(grey.crop((0, below + 48, 112, sheet.height)).getextrema()) < 100  # its caption
    assert captioned(sides, ["", "", ""]).width > captioned(sides[:1], [""]).width * 2


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    """Also where --device cuda says so."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("tim.app.common.check_device", lambda name: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    found = [common.device_of(name) for name in (None, "cuda", "cuda:1", "cpu")]
    assert found == ["cuda:3", "cuda:3", "cuda:1", "cpu"]
