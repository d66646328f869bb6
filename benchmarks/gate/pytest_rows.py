"""A pytest plugin that writes each test's outcome when it is known, as one line of JSON.

    TEST_ROWS=FILE python -m pytest -p benchmarks.gate.pytest_rows …

So that a run that is killed leaves what it had seen.
"""

import json
import os
from pathlib import Path

from ..record import rows


def pytest_configure(config):
    if "TEST_ROWS" in os.environ and not hasattr(config, "workerinput"):  # not in xdist's workers
        config.pluginmanager.register(Rows(Path(os.environ["TEST_ROWS"])))


class Rows:
    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self._write(report.outcome, report.nodeid, report.longrepr)

    def pytest_collectreport(self, report):
        if report.outcome != "passed":
            self._write(report.outcome, report.nodeid, report.longrepr)

    def _write(self, outcome: str, what: str, why) -> None:
        if outcome == "skipped" and isinstance(why, tuple):
            why = why[2]  # (path, line, reason)
        row = rows.Outcome(outcome, what, "" if outcome == "passed" else str(why)[-1500:])
        with self.path.open("a") as file:
            file.write(json.dumps(row.json()) + "\n")
