"""Where the benchmarks run, what they found, and what they had to leave out."""

import pytest
import torch

from .clock import machine
from .record import rows, table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEFT_OUT: dict[str, str] = {}
ROWS: list[rows.Row] = []  # in the order in which they were measured

if DEVICE == "cpu":
    torch.set_num_threads(1)  # threads that wait for one another time what else runs here


@pytest.fixture(scope="session")
def limits() -> machine.Limits:
    """What this device reaches, measured in this run."""
    return machine.limits(DEVICE, quick=DEVICE == "cpu")


def pytest_benchmark_update_machine_info(config, machine_info):
    """pytest-benchmark's own facts hold the host's name: ours instead."""
    machine_info.clear()
    machine_info.update(machine.describe(DEVICE))


def pytest_benchmark_update_json(config, benchmarks, output_json):
    rows.fill_ratios(ROWS)
    output_json["rows"] = [row.json() for row in ROWS]


def pytest_configure(config):
    config.option.benchmark_quiet = True  # its table has the launches in it: ours below


def pytest_terminal_summary(terminalreporter):
    rows.fill_ratios(ROWS)
    for kind in (rows.Op, rows.Network, rows.Turns, rows.Host):
        if own := [row for row in ROWS if isinstance(row, kind)]:
            terminalreporter.section(kind.title)
            terminalreporter.write_line(table.text(own, kind.columns))
    if LEFT_OUT:
        terminalreporter.section("left out")
        for why in dict.fromkeys(LEFT_OUT.values()):
            what = [name for name, reason in LEFT_OUT.items() if reason == why]
            terminalreporter.write_line(f"{why}: {'; '.join(what)}")
    if DEVICE == "cpu":
        terminalreporter.write_line("no GPU here: small shapes, and times of one core")
