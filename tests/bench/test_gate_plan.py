"""What the gate plans to run: every kernel, model and shape has its turn."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.cases import tasks
from benchmarks.cases.shapes import MODELS, PUBLISHED
from benchmarks.gate import parts, runner, stages
from benchmarks.record.rows import COMPILE, EAGER

ROOT = Path(__file__).parents[2]


def test_the_stages_of_the_cuda_kernels_run_their_tests():
    """Their ops' and those that run any backend; the others were Triton's already."""
    paths = [word for word in parts.parity("cuda", False, 1).command if word.endswith(".py")]
    assert all((ROOT / path).exists() for path in paths) and len(paths) == len(set(paths))
    names = " ".join(paths)
    assert all(f"test_{source.stem}" in names for source in ROOT.glob("csrc/*.cu"))
    assert "test_graphs" in names and "test_backend" not in names
    of_triton = parts.parity("triton", False, 1).command
    assert "tests/kernels" in of_triton and parts.NO_GPU in of_triton
    assert (ROOT / parts.NO_GPU).exists() and parts.NO_GPU not in paths[:-1]
    assert parts.BUILDS in (ROOT / "tests/kernels/test_extension.py").read_text()


def test_the_sanitizer_looks_at_our_kernels():
    """By the names that Triton and nvcc give them."""
    pattern = re.compile(parts.TRITON_KERNELS.removeprefix("regex="))
    for path in ROOT.glob("tim_kernels/*/triton.py"):
        kernels = re.findall(r"@kernel\ndef (\w+)", path.read_text())
        kernels += re.findall(r"@triton.jit\ndef (_\w+_kernel)", path.read_text())
        assert kernels and all(map(pattern.search, kernels)), path
    planted = (ROOT / "benchmarks/gate/planted.py").read_text()
    assert pattern.search(re.search(r"@triton.jit\ndef (\w+)", planted).group(1))
    substring = parts.CUDA_KERNELS.removeprefix("kernel_substring=")
    assert substring == "3tim"  # of _ZN3tim…, in which all of csrc/ is
    assert all("namespace tim {" in path.read_text() for path in ROOT.glob("csrc/*.cu"))


def test_every_model_and_batch_has_its_turn():
    cases = stages.planned_networks(dry_run=False)
    assert len({case.title for case in cases}) == len(cases)
    for task in (tasks.GRAPH_TASK, tasks.SAMPLING[1]):
        found = {(case.model_name, case.batch) for case in cases if case.task == task}
        assert found == {(n, b) for n, model in MODELS.items() for b in model.batches}
    assert {case.task for case in cases} == {
        tasks.GRAPH_TASK, tasks.FORWARD_TASK, *tasks.SAMPLING, *tasks.TRAINING
    }  # fmt: skip
    assert all(EAGER in case.only for case in cases)
    compiled = {case.task for case in cases if COMPILE in case.only}
    assert compiled >= {tasks.GRAPH_TASK, tasks.TRAINING[0], *tasks.SAMPLING[:2]}


def test_the_gate_measures_every_published_shape_and_op():
    cases = stages.planned_ops(dry_run=False)
    assert {case.shape_name for case in cases} == set(PUBLISHED)
    main = {case.call for case in cases if case.shape_name in stages.MAIN_SHAPES}
    assert main >= {case.call for case in cases} >= set(stages.CORE)
    assert cases[0].shape_name in stages.MAIN_SHAPES
    assert {case.direction for case in cases} == {"forward", "backward", "tangent"}


def test_the_tests_can_be_collected_on_a_bare_machine(tmp_path):
    """Without hypothesis and diffusers: what needs them is left out, each with its reason."""
    (tmp_path / "bare.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "real = PathFinder.find_spec\n"
        "def find_spec(name, path=None, target=None):\n"
        "    is_missing = name.partition('.')[0] in ('hypothesis', 'diffusers')\n"
        "    return None if is_missing else real(name, path, target)\n"
        "PathFinder.find_spec = find_spec\n"
    )
    rows = tmp_path / "rows.jsonl"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TEST_ROWS": str(rows)}
    options = ["-p", "bare", "-p", "no:hypothesispytest", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, "-p", "benchmarks.gate.pytest_rows",
         "tests/kernels", "-k", "test_any or test_model or sweep"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode in (0, 5), run.stdout
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    reasons = [row["why"] for row in found if row["outcome"] == "skipped"]
    assert any("hypothesis is not installed" in why for why in reasons)
    assert any("need diffusers" in why or "needs diffusers" in why for why in reasons)


def test_short_names():
    assert runner._short_name("NVIDIA H100 80GB HBM3") == "h100"
    assert runner._short_name("NVIDIA GeForce RTX 4090") == "rtx"
    assert runner._short_name(None) == "cpu"
