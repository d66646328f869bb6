"""The published code, a `tim` without __init__.py, works beside ours from any place on the path."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {
    "schedulers/transition.py": "from tim.models.c2i.tim_model import TiM\nNAME = 'transition'",
    "schedulers/transports.py": "from tim.schedulers.transition import NAME",
    "models/c2i/tim_model.py": "from tim.models.utils.funcs import NAME\nclass TiM: pass",
    "models/t2i/tim_model.py": "class TiM: pass",
    "models/utils/funcs.py": "NAME = 'funcs'",
    "data/c2i/dataset.py": "NAME = 'dataset'",
}
USE = """
import sys
from pathlib import Path
here, published = map(Path, sys.argv[1:3])
import tim.schedulers.transports, tim.schedulers.transition
from tim.models.c2i.tim_model import TiM
import tim.models.t2i.tim_model, tim.data.c2i.dataset
assert Path(tim.schedulers.transports.__file__).is_relative_to(published)
assert TiM.__module__ == "tim.models.c2i.tim_model"
import tim_kernels, tim.config
from tim.data import mnist
from tim.models import TiMTransformer2DModel
for ours in (tim, tim_kernels, tim.config, mnist, sys.modules[TiMTransformer2DModel.__module__]):
    assert Path(ours.__file__).is_relative_to(here), ours.__file__
print("both")
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    for name, text in MODULES.items():
        path = folder / "tim" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def use(published: Path, ours: Path, path: list[Path], before: str = "") -> None:
    run = subprocess.run(
        [sys.executable, "-c", before + USE, ours, published],
        cwd=published, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
    )  # fmt: skip
    assert run.stdout == "both\n", run.stderr


@pytest.mark.parametrize("is_before", [True, False])
def test_beside_a_checkout(published, is_before):
    use(published, ROOT, [published, ROOT] if is_before else [ROOT, published])


def test_before_an_editable_installation(published, tmp_path):
    """`pip install --editable` makes such a wheel and unpacks it where site looks."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("tim", "tim_kernels", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools.build_meta import *; build_editable(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, tmp_path],
        cwd=source, check=True, capture_output=True,
        env=os.environ | {"TIM_KERNELS_CUDA_ARCHS": "none"},
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    alone = f"import site, sys; sys.path = [p for p in sys.path if p != {str(ROOT)!r}]\n"
    use(published, source, [published], alone + f"site.addsitedir({str(site)!r})\n")
