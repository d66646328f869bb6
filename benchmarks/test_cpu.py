"""On this machine's CPU: "auto" is no slower than eager PyTorch, and what a call costs the host."""

import json
import os
import subprocess
import sys

import pytest
import torch

from .compare import cpu
from .compare.comparison import name_of
from .conftest import DEVICE, ROWS
from .record import rows
from .record.provenance import ROOT

LEAST = 0.95  # times eager's speed: what is the same code measures 0.96 to 1.04
OPS, NETWORKS = (cpu.ops(), cpu.networks()) if DEVICE == "cpu" else ((), ())  # else on the GPU


def ids(case) -> str:
    return f"{case.title}, {name_of(case.dtype)}".replace(", ", "-")


@pytest.mark.parametrize("case", OPS, ids=ids)
def test_auto_is_no_slower_than_eager(case):
    (row,) = cpu.turns(case, rounds=31)
    ROWS.append(row)
    assert row.ratio >= LEAST


@pytest.mark.parametrize("case", NETWORKS, ids=ids)
def test_whole_networks(case):
    found = cpu.turns(case, rounds=5)
    ROWS.extend(found)
    assert {row.base for row in found} == {rows.EAGER, rows.COMPILE}


def test_host_time(tmp_path):
    """In a process of its own, with the interpreter's kernels where there is no GPU."""
    path = tmp_path / "rows.json"
    environment = os.environ | {"TRITON_INTERPRET": str(int(not torch.cuda.is_available()))}
    command = [sys.executable, "-m", "benchmarks", "host", "--json", str(path)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    found = [rows.read(entry) for entry in json.loads(path.read_text())]
    ROWS.extend(found)
    assert not [row for row in found if row.multiple > row.most]
