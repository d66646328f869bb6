"""The gate's path without a GPU: parts that fail, that hang, that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import setup as build_script
from benchmarks.cases import tasks
from benchmarks.cases.shapes import MODELS
from benchmarks.compare.networks import FP8_ROOM
from benchmarks.gate import parts, runner, stages
from benchmarks.gate.parts import Stage
from benchmarks.record.rows import FP8, Facts

ROOT = Path(__file__).parents[2]
ROW = '{"kind": "test", "outcome": "passed", "what": "a_row"}\\n'
WRITE_A_ROW = f"import os; open(os.environ['TEST_ROWS'], 'a').write('{ROW}')"


def python(name: str, code: str, limit: float = 30, **options) -> Stage:
    return Stage(name, [sys.executable, "-c", code], limit, **options)


@pytest.fixture
def light(monkeypatch):
    """The first and last stages without a process that imports torch."""
    row = json.dumps({"kind": "machine", "gpu": "NVIDIA H100 80GB HBM3"})
    code = f"import os; open(os.environ['TEST_ROWS'], 'a').write('''{row}\\n''')"
    described = python("machine", code)
    quiet = python("state", "pass")
    monkeypatch.setattr(runner, "LEAST", 1.0)
    monkeypatch.setattr(
        runner, "worker", lambda name, *args, **kwargs: described if name == "describe" else quiet
    )


def outcomes(result: dict) -> dict[str, str]:
    return {stage["name"]: stage["outcome"] for stage in result["stages"]}


def test_nothing_stops_at_a_failure(light, tmp_path):
    planned = [
        python("fails", "raise SystemExit('this is why')"),
        python("hangs", f"{WRITE_A_ROW}; import time; time.sleep(60)", limit=3),
        python("cannot", "", why_not="no such tool"),
        Stage("is not there", [str(tmp_path / "nothing")], 5),
        python("says it", "print('0 errors')", must_say="0 errors"),
        python("says it and fails", "print('0 errors'); raise SystemExit(1)", must_say="0 errors"),
        python("planted", "raise SystemExit('Invalid')", must_say="Invalid", must_fail=True),
        python("planted, not seen", "print('Invalid')", must_say="Invalid", must_fail=True),
        python("is silent", "print('found 3')", must_say="0 errors"),
        python("reports", WRITE_A_ROW.replace("passed", "failed").replace("}", ', "why": "x"}')),
        python("works", WRITE_A_ROW),
    ]
    result = runner.run_part("ops", tmp_path / "out", "abc", dry_run=False, stages=planned)
    found = outcomes(result)
    assert found["fails"] == "failed" and found["hangs"] == "timed out"
    assert found["cannot"] == "left out" and found["is not there"] == "failed"
    assert found["says it"] == "passed" and found["is silent"] == "failed"
    assert found["says it and fails"] == "failed"
    assert found["planted"] == "passed" and found["planted, not seen"] == "failed"
    assert found["reports"] == "failed" and found["works"] == "passed"
    assert result["finished"] and result["ended"] and result["commit"] == "abc"
    reasons = {failure["what"]: failure["why"] for failure in result["failures"]}
    assert "this is why" in reasons["fails"] and "killed after 3 s" in reasons["hangs"]
    assert {"stage": "cannot", "what": "cannot", "why": "no such tool"} in result["left_out"]
    stage = next(s for s in result["stages"] if s["name"] == "hangs")
    assert stage["tests"] == {"passed": 1} and stage["seconds"] < 15
    (saved,) = (tmp_path / "out").glob("*.json")
    assert saved.name.endswith("-h100-ops.json")
    assert json.loads(saved.read_text()) == result
    assert "this is why" in saved.with_suffix(".log").read_text()
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_half_a_row_is_named_and_not_the_end(light, tmp_path):
    code = f"import os; open(os.environ['TEST_ROWS'], 'a').write('{{\"kind\": \"te{ROW}{ROW}')"
    result = runner.run_part("ops", tmp_path, "abc", dry_run=False, stages=[python("half", code)])
    assert result["finished"] and result["stages"][1]["tests"] == {"passed": 1}
    assert any("unreadable" in entry["why"] for entry in result["left_out"])


def test_wheels_that_do_not_fit_are_named(light, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/no_such_package-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    missing = runner.install(tmp_path / "wheels", tmp_path / "site")
    assert "pip failed" in missing
    result = runner.run_part("ops", tmp_path, "abc", dry_run=False, stages=[], missing=missing)
    assert {"stage": "gate", "what": "wheels", "why": missing} in result["left_out"]


def test_a_library_of_other_sources_is_built_again(monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    (tmp_path / "tim_kernels").mkdir()
    note = tmp_path / "tim_kernels/_cuda.json"

    def obstacle() -> str | None:
        return parts.build_if_missing(False)[0].why_not

    assert obstacle() is None
    note.write_text(json.dumps({"architectures": ["90"], "sources": "of another day"}))
    assert obstacle() is None
    note.write_text(json.dumps({"architectures": ["90"], "sources": build_script.source_hash()}))
    assert obstacle() == "it is built already"


@pytest.mark.parametrize("code, outcome", [("pass", "passed"), ("raise SystemExit(1)", "left out")])
def test_a_stage_whose_need_failed_is_left_out(light, tmp_path, code, outcome):
    planned = [python("build", code), python("tests", "pass", needs="build")]
    result = runner.run_part("ops", tmp_path, "abc", dry_run=False, stages=planned)
    assert outcomes(result)["tests"] == outcome
    whys = {entry["what"]: entry["why"] for entry in result["left_out"]}
    assert whys == ({} if outcome == "passed" else {"tests": "build failed"})
    assert parts.parity("cuda", False, 1).needs == parts.build(True).name


def test_a_second_run_leaves_the_first_one_s_file(light, tmp_path):
    for _ in range(3):
        runner.run_part("ops", tmp_path, "abc", dry_run=False, stages=[])
    names = {path.name.partition("-h100-")[2] for path in tmp_path.iterdir()}
    stems = "ops", "ops-2", "ops-3"
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("json", "log")}


def test_a_part_that_is_out_of_time_says_what_it_left(light, tmp_path):
    planned = [python("slow", "import time; time.sleep(60)"), python("late", "pass")]
    result = runner.run_part("ops", tmp_path, "abc", dry_run=False, budget=8, stages=planned)
    assert outcomes(result)["slow"] == "timed out"
    assert outcomes(result)["late"] == "left out"
    assert any(entry["why"] == "no time was left" for entry in result["left_out"])
    assert result["finished"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_a_usable_file(tmp_path, number):
    """In the middle of a stage; the stage does not live on."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.gate import runner; import signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"first = {WRITE_A_ROW!r}\n"
        "stages = [runner.Stage('first', [sys.executable, '-c', first], 20),\n"
        "          runner.Stage('endless', [sys.executable, '-c', first + "
        "'; import time; time.sleep(100)'], 100)]\n"
        "quiet = lambda *a, **k: runner.Stage('quiet', [sys.executable, '-c', ''], 9)\n"
        "runner.worker = quiet\n"
        f"runner.run_part('ops', Path({str(tmp_path)!r}), 'abc', True, stages=stages)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)

    def endless() -> dict | None:
        for path in tmp_path.glob("*.json"):
            found = [s for s in json.loads(path.read_text())["stages"] if s["name"] == "endless"]
            return found[0] if found and found[0].get("tests") else None

    until = time.monotonic() + 40
    while endless() is None and time.monotonic() < until:
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert children
    run.send_signal(number)
    run.wait(timeout=20)
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert not result["finished"]
    assert {s["name"]: s["outcome"] for s in result["stages"]}["first"] == "passed"
    assert endless()["tests"] == {"passed": 1}
    until = time.monotonic() + 10
    while any(_is_alive(child) for child in children) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(_is_alive(child) for child in children)


def _is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """`--part tests --dry-run` from the command line, as it is."""
    out = tmp_path_factory.mktemp("out")
    command = [sys.executable, "-m", "benchmarks.gate", "--part", "tests", "--dry-run"]
    run = subprocess.run(
        [*command, "--out", str(out), "--commit", "abc"], cwd=ROOT, capture_output=True, text=True
    )
    (path,) = out.glob("*.json")
    return run, json.loads(path.read_text())


def test_dry_run_of_the_tests(dry):
    run, result = dry
    assert run.returncode == 0, run.stdout + run.stderr
    found = outcomes(result)
    assert found["tests, triton"] == found["short list"] == "passed"
    assert found["build"] == found["tests, cuda"] == "left out"
    assert result["dry_run"] and result["finished"] and not result["failures"]
    tests = next(s for s in result["stages"] if s["name"] == "tests, triton")["tests"]
    assert tests["passed"] > 3
    assert result["limits"]["copy_gb_per_s"] > 0 and result["limits"]["gemm_tflop_per_s"] > 0
    assert result["machine"]["torch"] and result["machine"]["cores"] >= 1


@pytest.mark.nightly
def test_dry_run_of_the_short_part(tmp_path):
    """Some of everything in one file."""
    result = runner.run_part("short", tmp_path, "abc", dry_run=True)
    found = outcomes(result)
    ran = {"tests, triton", "fill compiler cache", "time ops", "fill model cache", "time models"}
    assert all(found[name] == "passed" for name in ran) and not result["failures"]
    assert {name.partition(",")[0] for name in found} >= {"build", "memcheck", "tuning"}
    assert {"op", "model"} <= {row["kind"] for row in result["rows"]} and result["finished"]


def test_the_short_part_asks_for_the_core_alone():
    brief, full = stages.planned_ops(False, brief=True), stages.planned_ops(False)
    assert {case.call for case in brief} == set(stages.CORE) and brief == full[: len(brief)]
    assert {case.shape_name for case in brief} == set(stages.MAIN_SHAPES)
    models_asked = {(c.model_name, c.task) for c in stages.planned_networks(False, brief=True)}
    both = tasks.GRAPH_TASK, tasks.TRAINING[0]
    assert models_asked == {(name, task) for name in MODELS for task in both}
    briefly = [s.name for s in parts.short_part(False) if "--brief" in s.command]
    assert briefly == ["fill compiler cache", "time ops", "fill model cache", "time models", "FP8"]


def test_the_file_names_no_machine(dry):
    _, result = dry
    text = json.dumps(result)
    assert os.uname().nodename not in text and str(Path.home()) not in text


def test_the_table_comes_last(dry):
    run, _ = dry
    table = run.stdout[run.stdout.index("tests: ") :]
    assert "DRY RUN" in table and "left out" in table and len(table.splitlines()) < 60


@pytest.mark.parametrize(
    "name, kind",
    [("time_ops", "op"), pytest.param("time_models", "model", marks=pytest.mark.nightly)],
)
def test_rows_of_a_worker(tmp_path, name, kind):
    """As the gate calls it, with the interpreter where it has kernels."""
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", parts.STAGES_MODULE, name, "--rows", str(path), "--dry-run"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert not [row for row in rows if row["kind"] == "failure"]
    measured = [row for row in rows if row["kind"] == kind]
    contenders = {row["contender"] for row in measured}
    assert contenders >= ({"eager", "triton"} if kind == "op" else {"eager", "tim, reference"})
    for row in measured:
        most = FP8_ROOM if row["contender"].startswith(FP8) else 2
        assert row["ms"] > 0 and row["error_vs_eager"] <= most, row


def test_what_there_is_no_time_for_is_named(tmp_path):
    run = stages.Run("time_ops", tmp_path / "rows.jsonl", seconds=0.2, dry_run=True)
    first, *others = stages.planned_ops(True)

    def compare(case):
        yield Facts("state", {})
        time.sleep(0.3)
        yield Facts("state", {})
        raise AssertionError("there was no time for this")

    run.through([first, *others], compare)
    _, _, *left = rows(run)
    assert [row["what"] for row in left] == [
        f"others in {first.title}",
        *(case.title for case in others),
    ]
    assert all(row["why"] == "no time was left" for row in left)


def rows(run: stages.Run) -> list[dict]:
    return [json.loads(line) for line in run.path.read_text().splitlines()]


def test_a_broken_comparison_is_a_failure_and_not_the_end(tmp_path):
    run = stages.Run("time_ops", tmp_path / "rows.jsonl", seconds=60, dry_run=True)

    def compare(case):
        if case is cases[0]:
            raise RuntimeError("CUDA error")
        yield Facts("state", {})

    cases = stages.planned_ops(True)
    run.through(cases, compare)
    first, *others = rows(run)
    assert first["kind"] == "failure" and "CUDA error" in first["why"]
    assert [row["kind"] for row in others] == ["state"] * (len(cases) - 1)


@pytest.mark.nightly
def test_a_broken_context_is_left_for_a_new_process(tmp_path):
    """The case that broke it is a failure, and the stage goes on with the next."""
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys; from pathlib import Path; from benchmarks.gate import stages\n"
        f"run = stages.Run('time_ops', Path({str(path)!r}), 400, True)\n"
        "run._broken = lambda: 'an illegal memory access'\n"
        "run.through(stages.planned_ops(True), lambda case: iter([stages.Facts('state', {})]))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    cases = stages.planned_ops(True)
    assert [row["kind"] for row in found[:2]] == ["state", "failure"]
    assert found[1]["what"] == cases[0].title and "illegal memory access" in found[1]["why"]
    later = {(row["op"], row["direction"]) for row in found[2:] if row["kind"] == "op"}
    assert later == {(case.call, case.direction) for case in cases[1:]}
