"""The gate's result as it grows: one JSON file, replaced whole, and a log beside it."""

import itertools
import time
from pathlib import Path

from . import rows
from .provenance import now, save, source_hash

KINDS_OF_TEST = {"opcheck": "opcheck", "graph": "graph", "rerun": "same_every_run|reruns"}


class Record:
    """The result of one part, saved whole."""

    def __init__(self, out: Path, part: str, commit: str, dry_run: bool):
        self.out, self.part = out, part
        self.stem = f"unnamed-{part}"
        self.saved_at = 0.0
        self.rows: list[rows.Row] = []  # of what was measured
        self.data = {
            "format": 1, "part": part, "dry_run": dry_run, "commit": commit,
            "sources": source_hash(), "started": now(), "ended": None, "finished": False,
            "machine": {}, "limits": {}, "state_before": {}, "state_after": {},
            "stages": [], "rows": [], "failures": [], "left_out": [],
        }  # fmt: skip

    @property
    def log(self) -> Path:
        return self.out / f"{self.stem}.log"

    def name_after(self, gpu: str) -> None:
        """From here on the files bear the GPU's name."""
        before = [path for path in self.out.glob(f"{self.stem}.*")]
        date = self.data["started"][:10]
        stem = f"{date}-{gpu}-{self.part}" + ("-dry" if self.data["dry_run"] else "")
        again = (f"{stem}-{n}" for n in itertools.count(2))  # an earlier run's file stays
        self.stem = next(filter(self._is_free, itertools.chain([stem], again)))
        for path in before:
            path.replace(self.out / f"{self.stem}{path.suffix}")

    def _is_free(self, stem: str) -> bool:
        return not (self.out / f"{stem}.json").exists()

    def take(self, row: rows.Row, stage: dict) -> None:
        """Put a row of a stage where it belongs."""
        match row:
            case rows.Facts("state", facts):
                self.data["state_after" if self.data["state_before"] else "state_before"] = facts
            case rows.Facts(kind, facts):
                self.data[kind] = facts
            case rows.Failure(what, why):
                self.fail(stage["name"], what, why)
            case rows.LeftOut(what, why):
                self.leave_out(stage["name"], what, why)
            case rows.Outcome():
                self._take_test(row, stage)
            case _:
                self.rows.append(row)

    def fail(self, stage: str, what: str, why: str) -> None:
        self.data["failures"].append({"stage": stage, "what": what, "why": why})

    def leave_out(self, stage: str, what: str, why: str) -> None:
        entry = {"stage": stage, "what": what, "why": why}
        if entry not in self.data["left_out"]:
            self.data["left_out"].append(entry)

    def _take_test(self, row: rows.Outcome, stage: dict) -> None:
        counts = stage.setdefault("tests", {})
        counts[row.outcome] = counts.get(row.outcome, 0) + 1
        if row.outcome == "passed":
            for kind, words in KINDS_OF_TEST.items():
                if any(word in row.what for word in words.split("|")):
                    counts[kind] = counts.get(kind, 0) + 1
            return
        note = self.leave_out if row.outcome == "skipped" else self.fail
        note(stage["name"], row.what, row.why)

    def save(self) -> None:
        rows.fill_ratios(self.rows)
        self.data["rows"] = [row.json() for row in self.rows]
        save(self.data, self.out / f"{self.stem}.json")
        self.saved_at = time.monotonic()
