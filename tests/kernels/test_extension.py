"""What is said of the compiled extension in every state that an installation can be in."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import setup as build_script
import tim_kernels
from tim_kernels.dispatch import backend, extension

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """Pretend: note(build) writes what setup.py would have, gpu(capability) plugs one in."""

    class Installation:
        def note(self, build: dict | None, has_library: bool = True) -> None:
            monkeypatch.setattr(extension, "BUILD", tmp_path / "_cuda.json")
            monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_cuda.so")
            if build is not None:
                extension.BUILD.write_text(json.dumps(build))
            if has_library:
                extension.LIBRARY.write_bytes(b"")
            forget()

        def gpu(self, capability: tuple[int, int] | None, cuda: str | None = "13.0") -> None:
            monkeypatch.setattr(extension, "_driver", lambda: 13010)
            monkeypatch.setattr(torch.version, "cuda", cuda)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

        def load(self, result: Exception | None) -> None:
            def load_library(path):
                assert path == extension.LIBRARY
                if result is not None:
                    raise result

            monkeypatch.setattr(torch.ops, "load_library", load_library)

    monkeypatch.setattr(extension, "_emulated", False)
    yield Installation()
    forget()


def forget() -> None:
    for cached in (extension.build, extension._not_loadable, extension._not_loaded):
        cached.cache_clear()


BUILT = {"architectures": ["80", "90", "100+PTX"], "nvcc": "13.0"}
NO_NVCC = {"reason": "it was not built: nvcc was not found"}


@pytest.mark.parametrize(
    "build, capability, cuda, message",
    [
        (None, (9, 0), "13.0", "build_ext --inplace"),
        (NO_NVCC, (9, 0), "13.0", "nvcc was not found"),
        (BUILT, (9, 0), None, "was built without CUDA"),
        (BUILT, None, "13.0", "there is no GPU"),
        (BUILT, (7, 5), "13.0", "built for sm_80, sm_90, sm_100+PTX, and this GPU is sm_75"),
        (BUILT | {"architectures": ["90"]}, (10, 0), "13.0", "this GPU is sm_100"),
        (BUILT | {"architectures": ["90"]}, (8, 0), "13.0", "this GPU is sm_80"),
    ],
    ids=["not built", "no nvcc", "CPU torch", "no GPU", "older GPU", "newer GPU", "other GPU"],
)
def test_why_it_cannot_run(installation, build, capability, cuda, message):
    installation.note(build)
    installation.gpu(capability, cuda)
    assert message in extension.why_not("cuda")
    if capability is None:
        return
    line = next(line for line in tim_kernels.explain().splitlines() if line.startswith("swiglu"))
    assert f"not cuda: {extension.why_not('cuda')}" in line


def test_a_library_that_is_missing_or_broken_is_reported(installation):
    installation.gpu((9, 0))
    installation.note(BUILT, has_library=False)
    assert "_cuda.so is missing" in extension.why_not("cuda")
    installation.note(BUILT)
    installation.load(OSError("undefined symbol: something"))
    assert "does not load: undefined symbol: something" in extension.why_not("cuda")


def test_an_older_driver_is_named(installation, monkeypatch):
    installation.note(BUILT)
    installation.gpu((9, 0))
    monkeypatch.setattr(extension, "_driver", lambda: 12080)
    assert "built with CUDA 13.0, and the driver supports 12.8" in extension.why_not("cuda")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_present(installation, capability):
    installation.note(BUILT)
    installation.gpu(capability)
    installation.load(None)
    assert extension.why_not("cuda") is None
    assert "needs a CUDA device" in extension.why_not("cpu")
    assert backend.obstacle("cuda", "ada_layer_norm", "cuda") is None
    line = next(line for line in tim_kernels.explain().splitlines() if line.startswith("swiglu"))
    assert line.split()[1] == "cuda" and "not cuda" not in line


def test_every_op_of_csrc_has_launchers_for_it():
    in_csrc = {path.stem for path in (ROOT / "csrc").glob("*.cu")}
    assert in_csrc == {name for name, op in backend.OPS.items() if op.cuda}
    for name in in_csrc:
        assert backend.OPS[name].cuda.forward and backend.OPS[name].cuda.backward


@pytest.mark.skipif(
    build_script.why_not_built() is not None, reason=f"{build_script.why_not_built()}"
)
def test_it_builds_and_loads_without_a_gpu(tmp_path):
    """One architecture; the operators are there, and give the dispatcher's error on the CPU."""
    for name in ("csrc", "tim", "tim_kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "_cuda.*")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    name = "tim_kernels_elsewhere"
    environment = os.environ | {"TIM_KERNELS_CUDA_ARCHS": "90", "TIM_KERNELS_NAMESPACE": name}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tmp_path, env=environment, check=True, capture_output=True)
    code = (
        "import torch, tim_kernels.dispatch.extension as e\n"
        "assert e.build()['architectures'] == ['90'] and e._not_loaded() is None\n"
        "x = torch.zeros(1, 2, 8)\n"
        "try: e.ops().swiglu_forward(x, x, x)\n"
        "except NotImplementedError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert f"Could not run '{name}::swiglu_forward'" in run.stdout, run.stderr


# Of torch's, with which csrc/ was built on the headers of 2.11; later ones have more.
NAMES_OF_2_11 = {
    "<torch/csrc/inductor/aoti_torch/c/shim.h>", "<torch/csrc/stable/accelerator.h>",
    "<torch/csrc/stable/library.h>", "<torch/csrc/stable/tensor.h>",
    "<torch/headeronly/core/ScalarType.h>", "STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_IMPL",
    "STD_TORCH_CHECK", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK",
    "aoti_torch_get_current_cuda_stream", "torch::headeronly::ScalarType", "torch::stable::Tensor",
    "torch::stable::accelerator::DeviceGuard",
}  # fmt: skip


def test_the_sources_use_only_what_the_oldest_torch_has():
    """A new name belongs in the list once a build with torch 2.11 (--no-deps is enough) has it."""
    pattern = re.compile(
        r"\b(?:aoti_torch_\w+|(?:STD_|STABLE_)?TORCH_[A-Z_]+)\b"
        r"|torch::(?:stable|headeronly)(?:::\w+)+|<torch/[^>]+>"
    )
    for path in (ROOT / "csrc").iterdir():
        assert set(pattern.findall(path.read_text())) <= NAMES_OF_2_11, path


def test_setup_says_why_it_built_nothing(monkeypatch):
    monkeypatch.setenv("TIM_KERNELS_CUDA_ARCHS", "none")
    assert "was 'none'" in build_script.why_not_built()
    monkeypatch.delenv("TIM_KERNELS_CUDA_ARCHS")
    monkeypatch.setattr(build_script, "nvcc", lambda: None)
    assert "nvcc was not found" in build_script.why_not_built()


def test_a_build_may_have_a_namespace_of_its_own(installation, monkeypatch):
    """So that two builds can live in one process."""
    monkeypatch.delenv("TIM_KERNELS_NAMESPACE", raising=False)
    assert build_script.namespace() == "tim_kernels_cuda"
    monkeypatch.setenv("TIM_KERNELS_NAMESPACE", "tim_kernels_2")
    assert build_script.namespace() == "tim_kernels_2"
    assert "-DTIM_KERNELS_NAMESPACE=tim_kernels_2" in build_script.compile_flags(ROOT)
    monkeypatch.setenv("TIM_KERNELS_NAMESPACE", "tim-kernels")
    with pytest.raises(SystemExit, match="tim-kernels"):
        build_script.namespace()
    installation.note(BUILT)
    assert extension.ops() is torch.ops.tim_kernels_cuda
    installation.note(BUILT | {"namespace": "tim_kernels_2"})
    assert extension.ops() is torch.ops.tim_kernels_2


def test_names_of_architectures(monkeypatch):
    monkeypatch.setenv("TIM_KERNELS_CUDA_ARCHS", "8.0; sm_90, 100+ptx")
    assert build_script.architectures() == ["80", "90", "100+PTX"]
    monkeypatch.setenv("TIM_KERNELS_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match="hopper"):
        build_script.architectures()
