"""Where the benchmarks run, and what they had to leave out."""

import pytest
import torch

from . import machine, models, ops, savings
from .results import fill_ratios

SUMMARIES = {"op": ops.summary, "model": models.summary, "saving": savings.summary}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEFT_OUT: dict[str, str] = {}

if DEVICE == "cpu":
    torch.set_num_threads(1)  # threads that wait for one another time what else runs here


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def limits(device) -> machine.Limits:
    """What this device reaches, measured in this run."""
    return machine.limits(device, quick=device == "cpu")


def pytest_benchmark_update_machine_info(config, machine_info):
    """pytest-benchmark's own facts hold the host's name: ours instead."""
    machine_info.clear()
    machine_info.update(machine.describe(DEVICE))


def pytest_benchmark_update_json(config, benchmarks, output_json):
    fill_ratios([bench["extra_info"] for bench in output_json["benchmarks"]])


def pytest_configure(config):
    config.option.benchmark_quiet = True  # its table has the launches in it: ours below


def pytest_terminal_summary(terminalreporter):
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = [bench.extra_info for bench in session.benchmarks] if session else []
    fill_ratios(rows)
    if any("kind" in row for row in rows):
        terminalreporter.section("medians, with the ratio to eager and to torch.compile")
        for row in rows:
            terminalreporter.write_line(SUMMARIES[row["kind"]](row))
    if LEFT_OUT:
        terminalreporter.section("left out")
        for why in dict.fromkeys(LEFT_OUT.values()):
            what = [name for name, reason in LEFT_OUT.items() if reason == why]
            terminalreporter.write_line(f"{why}: {'; '.join(what)}")
    if DEVICE == "cpu":
        terminalreporter.write_line("no GPU here: small shapes, and times of one core")
