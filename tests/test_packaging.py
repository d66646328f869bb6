"""What pip installs, seen from outside."""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

from tim.app import assets

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "tim" / "assets"
NOT_TORCH = {"PIL", "accelerate", "diffusers", "huggingface_hub", "matplotlib", "mlxtend"}
NOT_TORCH |= {"omegaconf", "safetensors", "scipy", "tim", "torch_fidelity", "torchmetrics", "tqdm"}
NOT_TORCH |= {"transformers", "triton", "typer"}

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

# As sitecustomize.py: a Python on whose disk a package is not found.
HIDE = """
import sys
from importlib.machinery import PathFinder

class Hide:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name == {!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Hide if finder is PathFinder else finder for finder in sys.meta_path]
"""
BESIDE = {"torch", "typing-extensions", "tim", "tim-kernels", "yaml"}  # of torch and omegaconf
COMFYUI = {"comfy", "folder-paths"}  # who runs the nodes


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


def test_trained_networks_are_a_package_of_their_own(installed, tmp_path):
    """The wheel is small; with tim-assets beside it the networks are found."""
    ask = [sys.executable, "-c", "from tim.app import assets; print(assets.folder('emoji'))"]
    path = str(installed)
    run = subprocess.run(
        ask, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert "is not installed" in run.stderr.splitlines()[-1]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    shutil.copytree(ASSETS, tmp_path / "assets")
    subprocess.run([*pip, "--target", tmp_path / "beside", tmp_path / "assets"], check=True)
    path += os.pathsep + str(tmp_path / "beside")
    run = subprocess.run(
        ask, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    found = Path(run.stdout.strip())
    assert found == tmp_path / "beside" / "tim_assets" / "emoji", run.stderr
    for name in assets.NAMES:
        for own in (ASSETS / name).iterdir():
            assert own.name == "LICENSE" or (found.parent / name / own.name).is_file(), own


@pytest.fixture(scope="module")
def metadata(installed) -> Message:
    (path,) = installed.glob("*.dist-info/METADATA")
    return email.message_from_string(path.read_text())


def test_the_wheel_holds_both_packages_with_their_data(installed):
    wanted = {
        path.relative_to(ROOT)
        for package in ("tim", "tim_kernels")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ASSETS not in path.parents
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


def test_only_torch_is_required_unconditionally(metadata):
    lines = metadata.get_all("Requires-Dist")
    assert [line for line in lines if ";" not in line] == ["torch>=2.11"]
    assert all("extra ==" in line for line in lines if ";" in line)


def test_the_extras_bring_what_tim_imports(metadata):
    """`tim` all that it imports, but `eval` what only the evaluation and its data do, `app` what
    the page does, and `lora` what adapters do."""
    brought = {extra: _brought_by(extra, metadata) for extra in ("tim", "eval", "app", "lora")}
    for path in (ROOT / "tim").rglob("*.py"):
        is_page = path == ROOT / "tim/app/page.py"
        is_evaluation = path.parent.name in ("data", "evaluation")
        is_lora = path.name == "lora.py"
        extra = "app" if is_page else "eval" if is_evaluation else "lora" if is_lora else "tim"
        known = brought[extra]
        if path.parent.name == "comfyui":
            known = known | COMFYUI
        assert _imported_by(path) <= known | BESIDE, path.relative_to(ROOT)


def test_the_extras_of_the_makefile_bring_the_system(metadata):
    for extra in ("demo", "test", "bench", "eval", "app"):
        assert _brought_by("tim", metadata) <= _brought_by(extra, metadata), extra


@pytest.mark.parametrize(
    ("command", "hidden"),
    [
        (["-c", "import tim"], "diffusers"),
        (["-c", "import tim.objective"], "accelerate"),
        (["-c", "import tim.pipelines"], "transformers"),
        (["-m", "tim", "demo"], "typer"),
        (["-m", "tim", "demo"], "diffusers"),
    ],
)
def test_tim_says_in_one_line_what_it_lacks(installed, tmp_path, command, hidden):
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(hidden))
    path = os.pathsep.join((str(tmp_path), str(installed)))
    run = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    last = run.stderr.strip().splitlines()[-1]
    assert last == f'ImportError: tim needs {hidden}: pip install "tim-kernels[tim]"'


def _brought_by(extra: str, metadata: Message) -> set[str]:
    """Names of distributions that an extra installs, those of other extras of ours included."""
    found = set()
    for line in metadata.get_all("Requires-Dist"):
        requirement, _, marker = line.partition(";")
        if re.search(rf"""extra == ["']{extra}["']""", marker):
            own = re.match(r"tim[-_]kernels\[(\w+)\]", requirement)
            name = re.match(r"[\w-]+", requirement)[0]
            found |= _brought_by(own[1], metadata) if own else {name.lower()}
    return found


def _imported_by(path: Path) -> set[str]:
    """Names of the distributions whose modules a file imports, the standard library's aside."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    tops = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    return {
        {"PIL": "pillow", "fontTools": "fonttools"}.get(top, top.replace("_", "-")) for top in tops
    }
