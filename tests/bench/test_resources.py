"""What the compilers make of every kernel; in a process of its own, without the interpreter that
the rest of the suite sets."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks.cases.calls import calls
from benchmarks.static import extension
from benchmarks.static.cubin import Resources
from benchmarks.static.resources import occupancy
from tim_kernels.dispatch import backend

ROOT = Path(__file__).parents[2]
NOTHING_WIDE_TO_LOAD = {"time_pair_embedding"}  # reads a few numbers a sample


def report(tmp_path, *options: str, backend: str = "triton") -> list[dict]:
    path = tmp_path / "resources.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "resources", "--json", str(path), *options]
    command += ["--backend", backend]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())["kernels"]


def test_no_kernel_spills_and_rows_are_loaded_16_bytes_at_a_time(tmp_path):
    rows = report(tmp_path, "--arch", "80", "90", "100", "--width", "768", "1152")
    assert {row["kernel"].partition(".")[0] for row in rows} == set(backend.OPS)
    for row in rows:
        row["where"] = "{kernel} of {call}, width {width}, sm_{arch}".format(**row)
    spilling = [row["where"] for row in rows if row["resources"]["spills"]]
    narrow = [
        row["where"]
        for row in rows
        if row["kernel"].partition(".")[0] not in NOTHING_WIDE_TO_LOAD
        and not row["resources"]["wide_loads"]
    ]
    assert not spilling and not narrow, f"spill: {spilling}; no 16-byte load: {narrow}"


GENERAL = "_any<", "<false,", "<1,"  # of CUDA: kernels that move single elements


@pytest.mark.skipif(extension.obstacle() is not None, reason=f"{extension.obstacle()}")
def test_no_cuda_kernel_spills_and_the_fast_ones_move_16_bytes_at_a_time(tmp_path):
    options = ("--arch", "80", "90", "100", "--dtype", "bfloat16", "float16", "float32")
    rows = report(tmp_path, *options, backend="cuda")
    assert {row["kernel"].partition(".")[0] for row in rows} >= set(backend.OPS) - {"attention"}
    for row in rows:
        row["where"] = "{kernel}{call}, sm_{arch}".format(**row)
    assert not [row["where"] for row in rows if row["resources"]["spills"]]
    fast = [row for row in rows if not any(word in row["where"] for word in GENERAL)]
    fast = [row for row in fast if not row["kernel"].startswith(tuple(NOTHING_WIDE_TO_LOAD))]
    ops = set(backend.OPS) - {"attention"} - NOTHING_WIDE_TO_LOAD
    assert {row["kernel"].partition(".")[0] for row in fast} == ops
    assert not [row["where"] for row in fast if not row["resources"]["wide_loads"]]
    sums_alone = "transition_loss.forward_teams"  # stores two numbers a block
    storing = [row for row in fast if row["kernel"] != sums_alone]
    assert not [row["where"] for row in storing if not row["resources"]["wide_stores"]]


def test_a_row_of_1152_does_not_pay_for_2048(tmp_path):
    """One power of two would make 1152 cost what 2048 does, 1.78 × what 1024 does per channel.
    (A tile of 1152 has half the rows of one of 1024 to share the conditioning rows among.)"""
    cost = defaultdict(dict)
    for row in report(tmp_path, "--width", "1024", "1152", "2048", "--op", "ada_layer_norm"):
        instructions = row["resources"]["instructions"] * row["num_warps"]
        width = row["width"]
        cost[row["kernel"], row["call"]][width] = instructions / int(row["constants"]["ROWS"])
    for kernel, of in cost.items():
        assert of[1152] <= 0.9 * of[2048], kernel
        assert of[1152] / 1152 <= 1.5 * of[1024] / 1024, kernel


def test_every_op_has_a_call():
    called = {call.name.partition(" ")[0] for call in calls()}
    assert called >= set(backend.OPS)


@pytest.mark.parametrize(
    "registers, warps, shared, expected",
    [
        (32, 4, 0, 64),  # everything fits
        (33, 4, 0, 48),  # 40 registers a thread: 12 warps a quarter
        (128, 4, 0, 16),
        (255, 1, 0, 8),
        (32, 4, 100 * 1024, 8),  # two programs' shared memory
        (16, 1, 0, 32),  # no more than 32 programs
    ],
)
def test_occupancy(registers, warps, shared, expected):
    resources = Resources(registers, 0, shared, 0, 0, 0, 0, 0)
    assert occupancy(resources, warps, 90) == expected


def test_a_kernel_is_listed_once(tmp_path):
    """The width of a transformer does not touch the step of the sampler."""
    options = ("--op", "transition_step", "--arch", "90", "--dtype", "bfloat16")
    one, two = (
        report(tmp_path, *options, "--width", *widths) for widths in (["64"], ["64", "128"])
    )
    assert one and len(one) == len(two)
