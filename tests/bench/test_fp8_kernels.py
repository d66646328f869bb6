"""What the compiler makes of the kernels that emit FP8, in a process without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import json, sys
from benchmarks.static.resources import compile_job, triton_jobs
ops = "ada_layer_norm", "swiglu", "quantise_rows"
jobs = triton_jobs([int(sys.argv[1])], [1152], ["bfloat16"], ops)
jobs = [job for job in jobs if job[3].endswith("to FP8") or job[3] == "quantise_rows"]
found = {job[3]: compile_job(*job) for job in jobs}
print(json.dumps({call: vars(each.resources) for call, each in found.items()}))
"""
CALLS = [
    "ada_layer_norm to FP8", "gated_residual_ada_layer_norm to FP8", "quantise_rows",
    "swiglu to FP8",
]  # fmt: skip


def compiled(architecture: int) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CODE, str(architecture)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return json.loads(done.stdout)


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", [89, 100])
def test_no_spills_and_16_byte_loads(architecture):
    """On sm_90 the report of resources tells, see test_resources.py."""
    found = compiled(architecture)
    assert sorted(found) == CALLS
    for call, resources in found.items():
        assert not resources["spills"] and not resources["is_trap"], call
        assert resources["wide_loads"] and resources["wide_stores"], call


@pytest.mark.nightly
def test_none_for_gpus_without_fp8():
    assert not compiled(80)
