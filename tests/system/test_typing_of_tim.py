"""What type checkers say about a user's script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from typing_extensions import assert_type
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from tim.models import TiMTransformer2DModel
from tim.objective import TransitionObjective
from tim.pipelines import TiMClassPipeline, TiMTextPipeline
from tim.transports import make

def fine(one: TiMClassPipeline, text: TiMTextPipeline, features: torch.Tensor) -> None:
    assert_type(one([1, 2]), ImagePipelineOutput)
    assert_type(text("a cat", return_dict=True), ImagePipelineOutput)
    (pictures,) = one(torch.tensor([3]), 256, 256, return_dict=False)
    (pictures,) = text(prompt_embeds=features, output_type="pt", return_dict=False)
    y, y_null = text.encode_prompt("a cat")
    assert_type(y_null, torch.Tensor)
    one.save_pretrained("folder", variant="fp16")
    TransitionObjective(make("OT_FM"), derivative_type="jvp", weight_time_type="sqrt")

def wrong(one: TiMClassPipeline, text: TiMTextPipeline) -> None:
    one(1, sample_type="diffusion")
    text("a cat", output_type="jpeg")
    make("OTFM")
    TransitionObjective(make("OT_FM"), derivative_type="difference")
    TiMTransformer2DModel(new_condition="t-t")
    TiMTransformer2DModel(depth="two")
    text.encode_prompt("a cat", do_classifier_free_guidance=False)[1].shape
"""
FIRST_WRONG = SCRIPT.splitlines().index('    one(1, sample_type="diffusion")') + 1  # from 1

# diffusers' register_to_config, around the constructor, has no annotations.
UNSEEN_BY_MYPY = [line for line in SCRIPT.splitlines() if "  TiMTransformer2DModel(" in line]


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "user.py"
    path.write_text(SCRIPT)
    return path


def assert_wrong_alone(lines: set[int]) -> None:
    assert lines == set(range(FIRST_WRONG, len(SCRIPT.splitlines()) + 1))


def test_pyright(script):
    run = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, script],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(run.stdout)["generalDiagnostics"]
    assert_wrong_alone({one["range"]["start"]["line"] + 1 for one in found})


@pytest.mark.nightly
def test_mypy(script, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", tmp_path, script],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    lines = run.stdout.splitlines()  # of the script alone
    errors = [line.split(":") for line in lines if "user.py:" in line and ": error:" in line]
    constructor = {SCRIPT.splitlines().index(line) + 1 for line in UNSEEN_BY_MYPY}
    assert_wrong_alone({int(line) for _, line, *_ in errors} | constructor)
