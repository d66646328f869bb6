"""What pip installs, seen from outside."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_TORCH = {"PIL", "accelerate", "diffusers", "matplotlib", "mlxtend", "omegaconf", "safetensors"}
NOT_TORCH |= {"scipy", "tim", "torchmetrics", "tqdm", "transformers", "triton", "typer"}

IMPORT_WITH_TORCH_ALONE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_TORCH!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import tim_kernels
for name in tim_kernels.__all__:
    getattr(tim_kernels, name)
print(tim_kernels.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The unpacked wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("tim", "tim_kernels", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("tim_kernels-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_holds_both_packages_with_their_data(installed):
    wanted = {
        path.relative_to(ROOT)
        for package in ("tim", "tim_kernels")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert Path("tim/configs/xl-256.yaml") in wanted
    assert not [path for path in sorted(wanted) if not (installed / path).is_file()]
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"tim", "tim_kernels"}


def test_tim_kernels_needs_torch_alone(installed):
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_WITH_TORCH_ALONE],
        cwd=installed,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(installed)


def test_the_command_tim_starts():
    command = Path(sys.executable).with_name("tim")
    run = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "demo" in run.stdout and "train" in run.stdout


def test_the_core_is_small():
    core = [line for line in requires("tim-kernels") if "extra ==" not in line]
    assert not [line for line in core if line.startswith(("torchvision", "timm", "mlxtend"))]
