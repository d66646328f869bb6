"""csrc/ compiled by g++ for the CPU, under sanitizers, and the ops' own tests run on it."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import setup as build_script

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
SANITIZERS = "-fsanitize=address,undefined"
FLAGS = [
    "-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas",
    SANITIZERS, "-fno-sanitize-recover=undefined", "-DTIM_DISPATCH_KEY=CPU",
    f"-DTORCH_TARGET_VERSION={build_script.OLDEST_TORCH}", f"-I{Path(__file__).parent}/emulation",
    f"-isystem{TORCH}/include", f"-isystem{TORCH}/include/torch/csrc/api/include",
]  # fmt: skip


def compile_op(op: str, folder: Path, source: Path = ROOT / "csrc") -> Path:
    """The shared library of one op, from csrc/ or a changed copy of it."""
    library = folder / f"{op}.so"
    files = ["-x", "c++", str(source / f"{op}.cu"), str(source / "registration.cpp")]
    link = [f"-L{TORCH}/lib", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run(["g++", *FLAGS, *files, *link, "-o", str(library)], check=True)
    return library


def run_tests(library: Path, *arguments: str) -> subprocess.CompletedProcess:
    """pytest in a process of its own, the extension emulated by `library`; a sanitizer that ends it
    has had its say, as nothing is captured there."""
    command = ["-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *arguments]
    return _run(command, TIM_KERNELS_TEST_BACKEND="cuda", TIM_KERNELS_EMULATION=str(library))


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python code that emulates the extension by libraries of `compile_op`."""
    return _run(["-c", code, *arguments], **environment)


def _run(command: list[str], **more: str) -> subprocess.CompletedProcess:
    runtimes = (
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in ("libasan.so", "libubsan.so")
    )
    environment = os.environ | {
        "LD_PRELOAD": " ".join(path.strip() for path in runtimes),
        "ASAN_OPTIONS": "detect_leaks=0,alloc_dealloc_mismatch=0",  # torch's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment | more, capture_output=True, text=True
    )
