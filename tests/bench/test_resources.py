"""What the compilers make of every kernel; in a process of its own, without the interpreter that
the rest of the suite sets."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from benchmarks.cases import fp8
from benchmarks.cases.calls import calls
from benchmarks.cases.shapes import SMALL
from benchmarks.static import extension
from benchmarks.static.cubin import Resources
from benchmarks.static.launches import without_folder
from benchmarks.static.resources import occupancy, refusal
from tim_kernels.dispatch import backend

ROOT = Path(__file__).parents[2]
IN_CSRC = {name for name, op in backend.OPS.items() if op.cuda}
NOTHING_WIDE_TO_LOAD = {"time_pair_embedding"}  # reads a few numbers a sample


CODE = """
import json, sys
from benchmarks.static import resources
folder, *what = sys.argv[1:]
def compiled(name, *options):
    resources.main([*options, "--json", f"{folder}/{name}.json"])
if what[:1] == ["consumer"]:
    compiled("consumer", "--backend", "triton", *what[1:])
elif what == ["the rest"]:
    for dtype in "bfloat16", "float16", "float32":
        compiled(dtype, "--backend", "triton", "--arch", "80", "90", "100", "--dtype", dtype)
elif what:
    compiled("cuda", "--backend", "cuda", *what)
else:
    compiled("XL, sm_90", "--backend", "triton", "--width", "1152")
    widths = "1024", "1152", "2048"
    options = "--op", "ada_layer_norm"
    compiled("widths", "--backend", "triton", "--width", *widths, *options, "--only-tim")
    compiled("wide", "--backend", "triton", "--width", "8192", *options)
    jobs = [resources.triton_jobs([90], widths, ["bfloat16"], ["transition_step"])
            for widths in ([64], [64, 128])]
    print(json.dumps([len(each) for each in jobs]))
"""


def run(folder: Path, *what: str) -> str:
    """All reports of a backend in one process, into a folder; returns its last line."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CODE, str(folder), *what]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return done.stdout.decode().splitlines()[-1]


def kernels(path: Path) -> list[dict]:
    return json.loads(path.read_text())["kernels"]


@pytest.fixture(scope="module")
def triton_reports(tmp_path_factory) -> tuple[Path, list[int]]:
    """The folder of what Triton compiled, and how many kernels one and two widths have."""
    folder = tmp_path_factory.mktemp("triton")
    return folder, json.loads(run(folder))


def test_no_kernel_spills_and_rows_are_loaded_16_bytes_at_a_time(triton_reports):
    assert_no_spills_and_wide_loads(triton_reports[0] / "XL, sm_90.json")


def test_rows_of_8192_channels_ask_for_no_more_than_there_is(triton_reports):
    rows = kernels(triton_reports[0] / "wide.json")
    assert max(row["num_warps"] for row in rows) == 16
    for row in rows:
        assert refusal(Resources(**row["resources"]), 90, row["num_warps"]) is None, row


@pytest.mark.nightly
def test_nor_at_either_width_for_any_architecture_and_dtype(tmp_path):
    run(tmp_path, "the rest")
    for name in ("bfloat16", "float16", "float32"):
        assert_no_spills_and_wide_loads(tmp_path / f"{name}.json")


CONSUMER_SHARED = 99 * 1024  # bytes a program, of sm_86, sm_89 and sm_120


def assert_small_enough(path: Path) -> None:
    sizes = [row["resources"]["shared"] for row in kernels(path)]
    assert sizes and max(sizes) <= CONSUMER_SHARED


def test_attention_of_a_consumer_gpu_neither_spills_nor_asks_for_too_much(tmp_path):
    run(tmp_path, "consumer", "--arch", "89", "--width", "1152", "--op", "attention")
    path = tmp_path / "consumer.json"
    assert_small_enough(path)
    assert not [row for row in kernels(path) if row["resources"]["spills"]]


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", ["86", "89", "120"])
def test_nor_any_kernel_of_consumer_gpus(tmp_path, architecture):
    run(tmp_path, "consumer", "--arch", architecture)
    assert_no_spills_and_wide_loads(tmp_path / "consumer.json")
    assert_small_enough(tmp_path / "consumer.json")


def assert_no_spills_and_wide_loads(path: Path) -> None:
    rows = kernels(path)
    has_fp8 = max(row["arch"] for row in rows) >= fp8.OLDEST
    ops = set(backend.OPS) - (set() if has_fp8 else {"quantise_rows"})
    assert {row["kernel"].partition(".")[0] for row in rows} == ops
    for row in rows:
        row["where"] = "{kernel} of {call}, width {width}, sm_{arch}".format(**row)
    assert not [row["where"] for row in rows if row["resources"]["is_trap"]]
    spilling = [row["where"] for row in rows if row["resources"]["spills"]]
    narrow = [
        row["where"]
        for row in rows
        if row["kernel"].partition(".")[0] not in NOTHING_WIDE_TO_LOAD
        and not row["resources"]["wide_loads"]
    ]
    assert not spilling and not narrow, f"spill: {spilling}; no 16-byte load: {narrow}"


GENERAL = "_any<", "<false,", "<1,"  # of CUDA: kernels that move single elements


@pytest.mark.skipif(extension.why_not() is not None, reason=f"{extension.why_not()}")
@pytest.mark.parametrize(
    "architecture", ["90", *(pytest.param(sm, marks=pytest.mark.nightly) for sm in ("80", "100"))]
)
def test_no_cuda_kernel_spills_and_the_fast_ones_move_16_bytes_at_a_time(tmp_path, architecture):
    run(tmp_path, "--arch", architecture, "--dtype", "bfloat16", "float16", "float32")
    rows = kernels(tmp_path / "cuda.json")
    assert {row["kernel"].partition(".")[0] for row in rows} >= IN_CSRC
    for row in rows:
        row["where"] = "{kernel}{call}, sm_{arch}".format(**row)
    assert not [row["where"] for row in rows if row["resources"]["spills"]]
    assert not [row["where"] for row in rows if row["resources"]["is_trap"]]
    fast = [row for row in rows if not any(word in row["where"] for word in GENERAL)]
    fast = [row for row in fast if not row["kernel"].startswith(tuple(NOTHING_WIDE_TO_LOAD))]
    ops = IN_CSRC - NOTHING_WIDE_TO_LOAD
    assert {row["kernel"].partition(".")[0] for row in fast} == ops
    assert not [row["where"] for row in fast if not row["resources"]["wide_loads"]]
    sums_alone = "transition_loss.forward"  # stores two numbers a block
    storing = [row for row in fast if row["kernel"] != sums_alone]
    assert not [row["where"] for row in storing if not row["resources"]["wide_stores"]]


def test_a_row_of_1152_does_not_pay_for_2048(triton_reports):
    """One power of two would make 1152 cost what 2048 does, 1.78 × what 1024 does per channel.
    (A tile of 1152 has half the rows of one of 1024 to share the conditioning rows among.)"""
    cost = defaultdict(dict)
    for row in kernels(triton_reports[0] / "widths.json"):
        instructions = row["resources"]["instructions"] * row["num_warps"]
        width = row["width"]
        cost[row["kernel"], row["call"]][width] = instructions / int(row["constants"]["ROWS"])
    for kernel, of in cost.items():
        assert of[1152] <= 0.9 * of[2048], kernel
        assert of[1152] / 1152 <= 1.5 * of[1024] / 1024, kernel


@pytest.mark.parametrize("kernel", ["_forward_kernel", "_swiglu_forward_kernel", "swiglu_forward"])
def test_a_kernel_s_name_may_have_its_op_s(kernel):
    """As a profiler needs it; in a report it stands behind that of the op."""
    assert without_folder(kernel, "swiglu") == "forward"


def test_every_op_has_a_call():
    of_fp8 = fp8.calls(SMALL["small, batch 2"], torch.bfloat16, "meta")
    called = {call.name.partition(" ")[0] for call in (*calls(), *of_fp8)}
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


@pytest.mark.parametrize(
    "arch, expected", [(86, (48, 16, 6)), (89, (48, 24, 6)), (90, (64, 32, 12))]
)
def test_occupancy_of_consumer_gpus(arch, expected):
    """48 warps and fewer programs; three programs of 32 KiB in 100, six in 228."""
    cases = (32, 4, 0), (16, 1, 0), (32, 2, 32 * 1024)
    found = [
        occupancy(Resources(registers, 0, shared, 0, 0, 0, 0, 0), warps, arch)
        for registers, warps, shared in cases
    ]
    assert tuple(found) == expected


def test_a_kernel_is_listed_once(triton_reports):
    """The width of a transformer does not touch the step of the sampler."""
    _, (one, two) = triton_reports
    assert one and one == two
