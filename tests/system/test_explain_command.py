"""`tim explain`, `tim --version` and the help pages."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import small_pipelines
import torch
import typer.main
from typer.testing import CliRunner

import tim_kernels
from tim.app.cli import app

pytestmark = pytest.mark.usefixtures("one_thread")


def tim(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)], prog_name="tim", env={"COLUMNS": "80"})
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def test_versions():
    code, said = tim("--version")
    found = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert code == 0 and found["torch"] == torch.__version__
    assert found["tim-kernels"] == tim_kernels.__version__
    assert found.keys() >= {"python", "triton", "device"}


def test_what_runs_on_this_machine():
    code, said = tim("explain")
    assert code == 0 and said.startswith("device ")
    assert all(name in said for name in ("ada_layer_norm", "swiglu", "attention of packed tokens"))


def test_a_network_block_by_block_and_its_plan():
    """Of the shipped ones, without a text encoder."""
    for name, kind in (("mnist", "of 10 classes"), ("emoji", "of texts")):
        code, said = tim("explain", name, "--steps", 4, "--guidance", 2, "--device", "cpu")
        assert code == 0, said
        lines = said.splitlines()
        assert kind in lines[0] and "M parameters in torch.float32 on cpu" in lines[0]
        assert re.search(r"^blocks\.3 +fused$", said, re.M)
        plan = "OTFM: 4 steps from t = 1 to 0, 3 of them guided: 7 network evaluations"
        assert plan in lines
        assert lines[-1].startswith("step by step" if name == "mnist" else "text read once")


def test_a_saved_pipeline_and_refusals(tmp_path):
    small_pipelines.class_pipeline().save_pretrained(tmp_path / "saved")
    code, said = tim("explain", tmp_path / "saved", "--steps", 2)
    assert code == 0 and "final_layer  fused" in said
    for arguments, wrong in (
        (["nowhere"], "there is no checkpoint nowhere"),
        (["mnist", "--steps", 0], "num_steps must be at least 1, got 0"),
        (["mnist", "--guidance", "nan"], "cfg_scale must be finite, got nan"),
        (["mnist", "--guidance", 0.5], "guidance must be at least 1, which is none; got 0.5"),
        (["mnist", "--dtype", "int8"], "dtype must be one of float32, bfloat16, float16"),
    ):
        code, said = tim("explain", *arguments)
        assert code == 1 and said.startswith("error: ") and wrong in said
        assert len(said.splitlines()) == 1


def every_command(command, words=()):
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, (*words, name))


COMMANDS = dict(every_command(typer.main.get_command(app)))


@pytest.mark.parametrize("words", COMMANDS)
def test_every_page_of_help(words):
    """Fits 80 columns and has an example; -h and --help show the same."""
    code, page = tim(*words, "-h")
    assert code == 0 and (0, page) == tim(*words, "--help")
    assert max(map(len, page.splitlines())) <= 80
    assert f"Usage: tim {' '.join(words)}".strip() in page
    assert "Example: tim " in page


@pytest.mark.parametrize("words", COMMANDS)
def test_the_examples_are_of_commands_and_options_that_there_are(words):
    _, _, example = (COMMANDS[words].epilog or "").partition("Example: tim ")
    named = re.sub('"[^"]*"', "x", example.partition(". ")[0]).split()
    assert tuple(named[: len(words)]) == words
    called = max((other for other in COMMANDS if tuple(named[: len(other)]) == other), key=len)
    known = {option for each in COMMANDS[called].params for option in each.opts}
    assert called and {word for word in named if word.startswith("--")} <= known


def test_an_error_of_usage_is_one_line():
    for arguments, said in (
        (["nope"], "No such command 'nope' (tim -h says more)"),
        (["train"], "Missing option '--config' (tim train -h says more)"),
        (["generate", "imagenet", "--nope"], "(tim generate imagenet -h says more)"),
        (["demo", "--seed", "x"], "Invalid value for '--seed'"),
        (["demo", "--output", "/dev/null/x.png"], "/dev/null"),
    ):
        code, output = tim(*arguments)
        (line,) = (line for line in output.splitlines() if line.startswith("error: "))
        assert code in (1, 2) and said in line


@pytest.mark.parametrize(
    "module, arguments, said",
    [
        ("mnist", "--tim a --flow b --output o.json --per-class 0", "per_class must be at least 1"),
        ("mnist_variants", "=model --output o.json", "NAME=DIR"),
        ("emoji", "--tim a --flow b --output o.json --data none", "none"),
        ("emoji_style", "judge none --output o.json --data none", "none"),
    ],
)
def test_a_module_that_is_run_says_what_is_wrong_in_one_line(
    tmp_path, monkeypatch, module, arguments, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *arguments.split()])
    monkeypatch.delitem(sys.modules, f"tim.evaluation.{module}", raising=False)
    with pytest.raises(SystemExit, match="^error: .*" + said):
        runpy.run_module(f"tim.evaluation.{module}", run_name="__main__")


def test_a_reader_that_has_enough_ends_it_without_a_word():
    code = (
        "import typer; from tim.app.common import errors_without_traceback as quiet\n"
        "def main():\n with quiet():\n  [typer.echo('line') for _ in range(99)]\ntyper.run(main)"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_python_m_tim_and_the_installed_command_are_the_same():
    scripts = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'tim = "tim.__main__:main"' in scripts
    run = subprocess.run(
        [sys.executable, "-m", "tim", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("tim-kernels ") and not run.stderr
