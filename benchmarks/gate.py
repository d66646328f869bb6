"""The GPU gate: builds, proves and measures everything on the GPU at hand, into one JSON file.

    python -m benchmarks.gate --part tests|ops|model|all --out DIR [--commit HASH] [--dry-run]

It needs Python with torch, triton and pytest, and downloads nothing; what is missing is left out
and named. Each part ends within nine minutes: its stages run one after the other in processes of
their own, each with a limit, and what runs over is killed. Nothing stops at a failure. The file is
replaced whole after every few rows, so that a run cut off anywhere leaves one that can be read.

DIR receives <date>-<gpu>-<part>.json and the same .log. --dry-run walks the same path on a CPU,
with Triton's interpreter, at tiny shapes: its numbers mean nothing. --wheels DIR holds packages
that the machine lacks (`make wheels`).
"""

import argparse
import ctypes
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import table
from .provenance import ROOT, commit_hash, now, save, source_hash
from .results import fill_ratios

PARTS = ("tests", "ops", "model")
BUDGET = 520.0  # seconds of a part; nine minutes with room for the last save
SAVE_EVERY = 2.0
BUILDS = "test_it_builds_and_loads_without_a_gpu"  # as the first stage did
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # of each of many processes
ONE_COMPILER = ONE_THREAD | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
TRITON_KERNELS, CUDA_KERNELS = "regex=^_[a-z_]+_kernel", "kernel_substring=3tim"  # mangled
KINDS_OF_TEST = {"opcheck": "opcheck", "graph": "graph", "rerun": "same_every_run|reruns"}


@dataclasses.dataclass
class Stage:
    """A command with a time limit; `obstacle` is why it cannot run here."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    obstacle: str | None = None
    must_say: str | None = None  # in its output
    must_fail: bool = False  # it holds a planted error


def build(dry_run: bool, is_needed: bool = True) -> Stage:
    """The extension for this GPU alone."""
    obstacle = None if is_needed else "it is built already"
    return Stage(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        120,
        {} if dry_run else {"TIM_KERNELS_CUDA_ARCHS": _architecture()},
        "a dry run builds nothing" if dry_run else obstacle,
    )


def build_if_missing(dry_run: bool) -> list[Stage]:
    """Of parts that find the tests' build in the same checkout, or none."""
    return [build(dry_run, not (ROOT / "tim_kernels/_cuda.so").exists())]


def worker(name: str, limit: float, dry_run: bool, **changes) -> Stage:
    """A stage of benchmarks.stages."""
    command = [sys.executable, "-m", "benchmarks.stages", name]
    command += ["--dry-run"] if dry_run else []
    return Stage(changes.pop("title", name.replace("_", " ")), command, limit, **changes)


def tests_part(dry_run: bool) -> list[Stage]:
    triton, cuda = parity("triton", dry_run, 220), parity("cuda", dry_run, 140)
    return [build(dry_run), triton, *sanitizer(dry_run)[:3], cuda, *sanitizer(dry_run)[3:]]


def parity(backend: str, dry_run: bool, limit: float) -> Stage:
    """The tests of tim_kernels on this device; of "cuda" those whose kernels are in csrc/, as the
    others have just run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.pytest_rows"]
    command += ["-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors"]
    if dry_run:
        command += ["tests/tim_kernels/test_swiglu.py", "-k", "test_any_leading_shape and packed"]
    else:
        folder, names = "tests/tim_kernels", [path.stem for path in ROOT.glob("csrc/*.cu")]
        names += ["accelerate", "extension", "golden", "graphs", "model_compile"]
        found = [path for name in names for path in ROOT.glob(f"{folder}/test_{name}*.py")]
        in_csrc = sorted(str(path.relative_to(ROOT)) for path in found)
        command += [folder] if backend == "triton" else in_csrc
        command += ["--deselect", f"{folder}/test_extension.py::{BUILDS}"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(12, len(os.sched_getaffinity(0))))]
    environment = ONE_THREAD | {
        "TIM_KERNELS_TEST_BACKEND": backend, "TORCHINDUCTOR_COMPILE_THREADS": "4",
    }  # fmt: skip
    obstacle = "a dry run has no CUDA" if dry_run and backend == "cuda" else None
    return Stage(f"tests, {backend}", command, limit, environment, obstacle)


def sanitizer(dry_run: bool) -> list[Stage]:
    """The short list alone, and under compute-sanitizer; a planted error shows that it looks. It
    looks at our kernels, not at cuBLAS's, and not at calls of the driver's that torch probes."""
    tool = _compute_sanitizer()
    obstacle = "a dry run has no CUDA" if dry_run else None
    if tool is None:
        obstacle = "compute-sanitizer is not on this machine"
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def under(kind: str, name: str, limit: float, *options: str, **changes) -> Stage:
        stage = worker(name, limit, dry_run, title=f"{kind}, {name.replace('_', ' ')}", **changes)
        stage.command = [
            str(tool), "--tool", kind, *options, "--error-exitcode", "99", "--print-limit", "20",
            "--kernel-name", TRITON_KERNELS, "--kernel-name", CUDA_KERNELS, *stage.command,
        ]  # fmt: skip
        return dataclasses.replace(stage, environment=environment, obstacle=obstacle)

    memory = "--report-api-errors", "no"
    planted = under(
        "memcheck", "planted_error", 60, *memory,
        must_say="Invalid __global__ write", must_fail=True,
    )  # fmt: skip
    return [
        worker("short_list", 90, dry_run),
        planted,
        under("memcheck", "short_list", 120, *memory, must_say="ERROR SUMMARY: 0 errors"),
        under("racecheck", "short_list", 120, must_say="RACECHECK SUMMARY: 0 hazards"),
    ]


def ops_part(dry_run: bool) -> list[Stage]:
    return [
        *build_if_missing(dry_run),
        worker("fill_compiler_cache", 100, dry_run, environment=ONE_COMPILER),
        worker("time_ops", 240, dry_run),
        worker("derivative", 80, dry_run),
        worker("tuning", 150, dry_run),
    ]


def model_part(dry_run: bool) -> list[Stage]:
    return [
        *build_if_missing(dry_run),
        worker("fill_model_cache", 90, dry_run, environment=ONE_COMPILER),
        worker("time_models", 340, dry_run),
        worker("max_autotune", 200, dry_run),
    ]


STAGES = {"tests": tests_part, "ops": ops_part, "model": model_part}


class Record:
    """The result of one part, saved whole."""

    def __init__(self, out: Path, part: str, commit: str, dry_run: bool):
        self.out, self.part = out, part
        self.stem = f"unnamed-{part}"
        self.saved_at = 0.0
        self.data = {
            "format": 1,
            "part": part,
            "dry_run": dry_run,
            "commit": commit,
            "sources": source_hash(),
            "started": now(),
            "ended": None,
            "finished": False,
            "machine": {},
            "limits": {},
            "state_before": {},
            "state_after": {},
            "stages": [],
            "rows": [],
            "failures": [],
            "left_out": [],
        }

    @property
    def log(self) -> Path:
        return self.out / f"{self.stem}.log"

    def name_after(self, gpu: str) -> None:
        """From here on the files bear the GPU's name."""
        before = [path for path in self.out.glob(f"{self.stem}.*")]
        date = self.data["started"][:10]
        self.stem = f"{date}-{gpu}-{self.part}" + ("-dry" if self.data["dry_run"] else "")
        for path in before:
            path.replace(self.out / f"{self.stem}{path.suffix}")

    def take(self, row: dict, stage: dict) -> None:
        """Put a row of a stage where it belongs."""
        kind = row.pop("kind")
        if kind in ("machine", "limits", "tuning"):
            self.data[kind] = row.get("tuning", row)
        elif kind == "state":
            self.data["state_after" if self.data["state_before"] else "state_before"] = row
        elif kind == "failure":
            self.data["failures"].append({"stage": stage["name"], **row})
        elif kind == "left out":
            if (entry := {"stage": stage["name"], **row}) not in self.data["left_out"]:
                self.data["left_out"].append(entry)
        elif kind == "test":
            self._take_test(row, stage)
        else:
            self.data["rows"].append({"kind": kind, **row})

    def _take_test(self, row: dict, stage: dict) -> None:
        counts = stage.setdefault("tests", {})
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
        if row["outcome"] == "passed":
            for kind, words in KINDS_OF_TEST.items():
                if any(word in row["what"] for word in words.split("|")):
                    counts[kind] = counts.get(kind, 0) + 1
            return
        where = "left_out" if row["outcome"] == "skipped" else "failures"
        self.data[where].append({"stage": stage["name"], "what": row["what"], "why": row["why"]})

    def save(self) -> None:
        fill_ratios(self.data["rows"])
        save(self.data, self.out / f"{self.stem}.json")
        self.saved_at = time.monotonic()


class Gate:
    """Runs the stages of one part."""

    def __init__(self, record: Record, budget: float, scratch: Path, site: Path | None):
        self.record, self.scratch, self.site = record, scratch, site
        self.rows = scratch / "rows.jsonl"  # of all stages: later ones look up the limits
        self.taken = 0
        self.until = time.monotonic() + budget

    def run(self, stages: list[Stage], dry_run: bool) -> None:
        self._stage(worker("describe", 120, dry_run, title="machine"))
        self.record.name_after(_short_name(self.record.data["machine"].get("gpu")))
        for stage in stages:
            self._stage(stage)
        self.until = max(self.until, time.monotonic() + 20)
        self._stage(worker("state", 20, dry_run, title="state after"))
        self.record.data["finished"] = True

    def _stage(self, stage: Stage) -> None:
        entry = {"name": stage.name, "outcome": "running", "seconds": 0.0, "limit": stage.limit}
        self.record.data["stages"].append(entry)
        left = self.until - time.monotonic()
        obstacle = stage.obstacle or (None if left > 5 else "no time was left")
        if obstacle:
            entry |= {"outcome": "left out", "why": obstacle}
            self.record.data["left_out"].append(
                {"stage": stage.name, "what": stage.name, "why": obstacle}
            )
            self.record.save()
            return
        print(f"{stage.name} …", flush=True)
        failures = len(self.record.data["failures"])
        try:
            self._run(stage, entry, min(stage.limit, left))
        except OSError as error:
            entry |= {"outcome": "failed", "why": str(error)}
        if entry["outcome"] == "passed" and len(self.record.data["failures"]) > failures:
            entry |= {"outcome": "failed", "why": "see failures"}
        elif entry["outcome"] != "passed":
            self.record.data["failures"].append(
                {"stage": stage.name, "what": stage.name, "why": entry["why"]}
            )
        self.record.save()

    def _run(self, stage: Stage, entry: dict, limit: float) -> None:
        start = time.monotonic()
        entry["limit"] = round(limit, 1)
        with self.record.log.open("ab") as log:
            log.write(f"\n=== {stage.name}: {' '.join(stage.command[1:])}\n".encode())
            log.flush()
            begin, is_new = log.tell(), False
            process = subprocess.Popen(
                self._command(stage, limit), cwd=ROOT, env=self._environment(stage), stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
            try:
                while process.poll() is None and time.monotonic() < start + limit:
                    time.sleep(0.2)
                    entry["seconds"] = round(time.monotonic() - start, 1)
                    is_new |= self._take_rows(entry)
                    if is_new and time.monotonic() > self.record.saved_at + SAVE_EVERY:
                        self.record.save()
                        is_new = False
                is_late = process.poll() is None
            finally:
                _kill(process)
            self._take_rows(entry)
        entry["seconds"] = round(time.monotonic() - start, 1)
        with self.record.log.open("rb") as log:
            log.seek(begin)
            output = log.read().decode(errors="replace")
        entry["returncode"] = process.returncode
        if is_late:
            entry |= {"outcome": "timed out", "why": f"killed after {limit:.0f} s"}
        elif stage.must_say is not None and stage.must_say not in output:
            why = f"it did not say {stage.must_say!r}: {output[-1500:]}"
            entry |= {"outcome": "failed", "why": why}
        elif bool(process.returncode) != stage.must_fail:
            entry |= {"outcome": "failed", "why": f"exit {process.returncode}: {output[-1500:]}"}
        else:
            entry["outcome"] = "passed"

    def _command(self, stage: Stage, limit: float) -> list[str]:
        """A worker is told to end a little before it would be killed."""
        if "benchmarks.stages" not in stage.command:
            return stage.command
        return [*stage.command, "--rows", str(self.rows), "--seconds", f"{0.85 * limit:.0f}"]

    def _environment(self, stage: Stage) -> dict[str, str]:
        environment = os.environ | stage.environment | {"TEST_ROWS": str(self.rows)}
        environment["PYTHONUNBUFFERED"] = "1"
        environment.pop("TIM_KERNELS_BACKEND", None)
        if self.record.data["dry_run"]:
            environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        else:
            environment.pop("TRITON_INTERPRET", None)
        if self.site is not None:
            paths = [str(self.site), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        return environment

    def _take_rows(self, entry: dict) -> bool:
        """Whether there were new whole lines."""
        if not self.rows.exists():
            return False
        with self.rows.open("rb") as file:
            file.seek(self.taken)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self.taken += len(new)
        for line in new.splitlines():
            self.record.take(json.loads(line), entry)
        return bool(new)


def _kill(process: subprocess.Popen) -> None:
    """The stage and whatever it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _compute_sanitizer() -> Path | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.path.join(home, "bin")
    )
    return Path(found) if found else None


@functools.cache
def _architecture() -> str:
    """The GPU's, such as "90"; asked in a process of its own."""
    code = "import torch; print('%d%d' % torch.cuda.get_device_capability())"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.decode().strip()


def _short_name(gpu: str | None) -> str:
    """ "NVIDIA H100 80GB HBM3" → "h100"."""
    words = [word for word in (gpu or "cpu").split() if word not in ("NVIDIA", "Tesla", "GeForce")]
    return "".join(c for c in words[0].lower() if c.isalnum())


def install(wheels: Path, site: Path) -> None:
    """The packages among them that this machine lacks, for the length of the run."""
    missing = []
    for path in sorted(wheels.glob("*.whl")):
        try:
            importlib.metadata.version(path.name.partition("-")[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(path))
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--no-compile", "--target", str(site), *missing], check=True)


def run_part(
    part: str,
    out: Path,
    commit: str,
    dry_run: bool,
    budget: float = BUDGET,
    stages: list[Stage] | None = None,
    site: Path | None = None,
) -> dict:
    """One part, with its own stages unless others are given; returns what the file holds."""
    out.mkdir(parents=True, exist_ok=True)
    record = Record(out, part, commit, dry_run)
    record.save()
    with tempfile.TemporaryDirectory() as scratch:
        gate = Gate(record, budget, Path(scratch), site)
        try:
            gate.run(STAGES[part](dry_run) if stages is None else stages, dry_run)
        except (KeyboardInterrupt, SystemExit) as stop:
            record.data["failures"].append({"stage": "gate", "what": "stopped", "why": repr(stop)})
            raise
        finally:
            record.data["ended"] = now()
            record.save()
    return record.data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to use in this run")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    commit = args.commit or commit_hash()
    results = []
    with tempfile.TemporaryDirectory() as site:
        if args.wheels:
            install(args.wheels, Path(site))
        for part in PARTS if args.part == "all" else (args.part,):
            path = Path(site) if args.wheels else None
            results.append(run_part(part, args.out, commit, args.dry_run, site=path))
    print("\n\n".join(table.of_result(result) for result in results))
    return int(any(result["failures"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
