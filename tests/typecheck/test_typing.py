"""What mypy and pyright say of a script that is right, and of one with mistakes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = HERE / "user.py", HERE / "mistakes.py"


@pytest.fixture
def check(tmp_path):
    """Run a type checker on both scripts, as one who has installed the package."""

    def run(module: str, *options: str) -> str:
        assert importlib.util.find_spec(module), (
            f"{module} is not installed: it is of the test extra"
        )
        done = subprocess.run(
            [sys.executable, "-m", module, *options, *map(str, SCRIPTS)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1, f"{module} did not run to its end:\n{done.stdout}{done.stderr}"
        return done.stdout

    return run


def marked() -> set[tuple[str, int]]:
    lines = enumerate(SCRIPTS[1].read_text().splitlines(), 1)
    return {("mistakes.py", number) for number, line in lines if line.endswith("# wrong")}


def test_mypy(check):
    found = re.findall(r"(\w+\.py):(\d+): error", check("mypy", "--strict", "--no-error-summary"))
    assert {(name, int(line)) for name, line in found} == marked()


def test_pyright(check):
    diagnostics = json.loads(check("pyright", "--outputjson", "--pythonpath", sys.executable))
    found = {
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1)
        for each in diagnostics["generalDiagnostics"]
        if each["severity"] == "error"
    }
    assert found == marked()
