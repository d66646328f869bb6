"""The stages of the gate's parts: what each runs, in which order, and for how long."""

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys

from ..record.provenance import ROOT

STAGES_MODULE = "benchmarks.gate.stages"
BUILDS = "test_it_builds_and_loads_without_a_gpu"  # as the first stage did
NO_GPU = "tests/kernels/test_attention_compile.py"  # what Triton compiles anywhere
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # of each of many processes
ONE_COMPILER = ONE_THREAD | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
TRITON_KERNELS, CUDA_KERNELS = "regex=^_[a-z0-9_]+_kernel", "kernel_substring=3tim"  # mangled


@dataclasses.dataclass
class Stage:
    """A command with a time limit; `why_not` is why it cannot run here, `needs` an earlier stage
    without which it means nothing."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    why_not: str | None = None
    must_say: str | None = None  # in its output
    must_fail: bool = False  # it holds a planted error
    needs: str | None = None


def build(dry_run: bool, is_needed: bool = True) -> Stage:
    """The extension for this GPU alone."""
    why_not = None if is_needed else "it is built already"
    return Stage(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        120,
        {} if dry_run else {"TIM_KERNELS_CUDA_ARCHS": _architecture()},
        "a dry run builds nothing" if dry_run else why_not,
    )


def build_if_missing(dry_run: bool) -> list[Stage]:
    """Of parts that may find the tests' build in the same checkout."""
    import setup as build_script  # needs setuptools, which only a build does

    note = ROOT / "tim_kernels/_cuda.json"
    built = json.loads(note.read_text()).get("sources") if note.exists() else None
    return [build(dry_run, built != build_script.source_hash())]


def worker(name: str, limit: float, dry_run: bool, brief: bool = False, **changes) -> Stage:
    """A stage of stages.py."""
    command = [sys.executable, "-m", STAGES_MODULE, name]
    command += ["--dry-run"] * dry_run + ["--brief"] * brief
    return Stage(changes.pop("title", name.replace("_", " ")), command, limit, **changes)


def tests_part(dry_run: bool) -> list[Stage]:
    backends = parity("triton", dry_run, 220), parity("cuda", dry_run, 140)
    return [build(dry_run), *backends, *sanitizer(dry_run)]


def parity(backend: str, dry_run: bool, limit: float) -> Stage:
    """The tests of tim_kernels on this device; of "cuda" those whose kernels are in csrc/, as the
    others have just run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gate.pytest_rows"]
    command += ["-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors"]
    if dry_run:
        command += ["tests/kernels/test_swiglu.py", "-k", "test_any_leading_shape and packed"]
    else:
        folder, names = "tests/kernels", [path.stem for path in ROOT.glob("csrc/*.cu")]
        names += ["accelerate", "extension", "golden", "graphs", "model_compile"]
        found = [path for name in names for path in ROOT.glob(f"{folder}/test_{name}*.py")]
        in_csrc = sorted(str(path.relative_to(ROOT)) for path in found)
        command += [folder] if backend == "triton" else in_csrc
        command += ["--deselect", f"{folder}/test_extension.py::{BUILDS}", "--ignore", NO_GPU]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(16, len(os.sched_getaffinity(0))))]
    environment = ONE_THREAD | {
        "TIM_KERNELS_TEST_BACKEND": backend, "TORCHINDUCTOR_COMPILE_THREADS": "4",
    }  # fmt: skip
    why_not = "a dry run has no CUDA" if dry_run and backend == "cuda" else None
    needs = "build" if backend == "cuda" else None
    return Stage(f"tests, {backend}", command, limit, environment, why_not, needs=needs)


def sanitizer(dry_run: bool) -> list[Stage]:
    """The short list alone, under memcheck and under racecheck; a planted error shows that the tool
    looks. It looks at our kernels, not at cuBLAS's, and not at calls of the driver's that torch
    probes."""
    tool = _compute_sanitizer()
    if tool is None:
        why_not, tool = "compute-sanitizer is not on this machine", ""
    else:
        why_not = "a dry run has no CUDA" if dry_run else None
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def under(kind: str, name: str, limit: float, *options: str, **changes) -> Stage:
        stage = worker(name, limit, dry_run, title=f"{kind}, {name.replace('_', ' ')}", **changes)
        stage.command = [
            tool, "--tool", kind, *options, "--error-exitcode", "99", "--print-limit", "20",
            "--kernel-name", TRITON_KERNELS, "--kernel-name", CUDA_KERNELS, *stage.command,
        ]  # fmt: skip
        return dataclasses.replace(stage, environment=environment, why_not=why_not)

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
        worker("fill_compiler_cache", 90, dry_run, environment=ONE_COMPILER),
        worker("time_ops", 240, dry_run),
        worker("derivative", 100, dry_run),
        worker("attention", 60, dry_run),
        worker("products", 60, dry_run),
        worker("fp8", 90, dry_run, title="FP8"),
        worker("tuning", 150, dry_run),
    ]


def model_part(dry_run: bool) -> list[Stage]:
    return [
        *build_if_missing(dry_run),
        worker("fill_model_cache", 90, dry_run, environment=ONE_COMPILER),
        worker("time_models", 340, dry_run),
        worker("max_autotune", 200, dry_run),
    ]


def short_part(dry_run: bool) -> list[Stage]:
    """Some of each of the three, for a GPU that is there for minutes: all tests, the core ops, a
    forward and a training step of each model, memcheck; what time is left goes to tuning."""
    ahead = {"brief": True, "environment": ONE_COMPILER}
    _, *memcheck, _ = sanitizer(dry_run)
    return [
        *build_if_missing(dry_run),
        parity("triton", dry_run, 260),
        parity("cuda", dry_run, 140),
        worker("fill_compiler_cache", 45, dry_run, **ahead),
        worker("time_ops", 60, dry_run, brief=True),
        worker("fill_model_cache", 45, dry_run, **ahead),
        worker("time_models", 130, dry_run, brief=True),
        worker("fp8", 40, dry_run, brief=True, title="FP8"),
        *memcheck,
        worker("tuning", 120, dry_run),
    ]


FULL = {"tests": tests_part, "ops": ops_part, "model": model_part}
STAGES = FULL | {"short": short_part}


def _compute_sanitizer() -> str | None:
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}{os.pathsep}{cuda}/bin")


@functools.cache
def _architecture() -> str:
    """The GPU's, such as "90"; asked in a process of its own."""
    code = "import torch; print('%d%d' % torch.cuda.get_device_capability())"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.decode().strip()
