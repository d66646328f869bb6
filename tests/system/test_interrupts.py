"""Ctrl-C: a command ends in one line, with exit code 130 and no half-written file."""

import os
import signal
import subprocess
import sys

import pytest
import small_mnist
import small_pipelines
import torch
import yaml
from digit_folders import save_digits
from typer.testing import CliRunner

from tim import config
from tim.app.cli import app
from tim.encoders import Autoencoder
from tim.models import TiMTransformer2DModel

# Each would take long; and what of its progress is on stderr when it draws.
COMMANDS = {
    "sample": (["mnist", "3", "--steps", "20000", "--output", "x.png"], "steps:"),
    "generate": (
        ["imagenet", "--checkpoint", "mnist-model", "--dtype", "float32", "--output", "out",
         "--num-fid-samples", "99999"], "pictures",
    ),
    "train": (
        ["--config", "small.yaml", "--output", "run", "training.max_train_steps=1000000"], "train:",
    ),
    "demo": (["--output", "x.png"], "samples:"),
    "preprocess": (["pictures", "latents", "--vae", "vae", "--native"], "0/"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    from tim.app import assets

    # As in a terminal: what a shell runs in the background has Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist-model").symlink_to(assets.folder("mnist"))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config.resolved(small_mnist.small())))
    yield
    signal.signal(signal.SIGINT, before)


def no_half_written(folder):
    names = [path.name for path in folder.rglob("*")]
    assert "x.png" not in names
    assert not [name for name in names if "partial" in name]


@pytest.mark.parametrize("name", COMMANDS)
def test_in_the_middle_of_the_network(tmp_path, monkeypatch, one_thread, name):
    if name == "preprocess":
        save_digits(tmp_path / "pictures", 2)
        small_pipelines.sd_vae().save_pretrained(tmp_path / "vae")
    calls = []

    def interrupted(forward):
        def call(self, *args, **options):
            calls.append(name)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return forward(self, *args, **options)

        return call

    for cls, method in ((TiMTransformer2DModel, "forward"), (Autoencoder, "encode")):
        monkeypatch.setattr(cls, method, interrupted(getattr(cls, method)))
    result = CliRunner().invoke(app, [name, *COMMANDS[name][0]])
    assert result.exit_code == 130 and isinstance(result.exception, SystemExit), result.output
    assert "Traceback" not in result.output
    assert "stopped" in result.output.strip().splitlines()[-1]
    no_half_written(tmp_path)


@pytest.mark.parametrize(
    "name", ["sample", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("demo", "generate"))]
)
def test_a_process(tmp_path, name):
    arguments, sign = COMMANDS[name]
    process = subprocess.Popen(
        [sys.executable, "-m", "tim", name, *arguments], stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        said = b""
        while sign.encode() not in said and process.poll() is None:
            said += os.read(process.stderr.fileno(), 4096)
        process.send_signal(signal.SIGINT)
        said = (said + process.communicate(timeout=60)[1]).decode()
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Traceback" not in said and "stopped" in said.strip().splitlines()[-1]
    no_half_written(tmp_path)


def test_while_it_is_loaded(monkeypatch, capsys):
    """Before there is any command."""
    from tim import __main__

    class Loading:
        def find_spec(self, name, path=None, target=None):
            if name == "tim.app.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "tim.app.cli")
    monkeypatch.setattr(sys, "meta_path", [Loading(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_the_bar_ends_before_the_error_is_told(tmp_path, monkeypatch, one_thread):
    def forward(self, x, *args, **options):
        return torch.full_like(x, torch.nan)

    monkeypatch.setattr(TiMTransformer2DModel, "forward", forward)
    result = CliRunner().invoke(app, ["sample", "mnist", "3", "--steps", "2"])
    assert result.exit_code == 1
    assert result.output.strip().splitlines()[-1].startswith("error: the samples are not finite")
    assert not list(tmp_path.glob("*.png"))
