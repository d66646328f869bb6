"""The GPU gate: builds, proves and measures everything on the GPU at hand, into one JSON file.

    python -m benchmarks.gate --part tests|ops|model|all|short --out DIR [--commit HASH] [--dry-run]

It needs Python with torch, triton and pytest, and downloads nothing; what is missing is left out
and named. Each part ends within nine minutes: its stages run one after the other in processes of
their own, each with a limit, and what runs over is killed. "all" runs the three one after the
other; "short" is one part with the most telling of each. Nothing stops at a failure. The file is
replaced whole after every few rows, so that a run cut off anywhere leaves one that can be read.

DIR receives <date>-<gpu>-<part>.json and the same .log. --dry-run walks the same path on a CPU,
with Triton's interpreter, at tiny shapes: its numbers mean nothing. --wheels DIR holds packages
that the machine lacks (`make wheels`).
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..record import rows
from ..record.provenance import ROOT, commit_hash, now
from ..record.record import Record
from . import summary
from .parts import FULL, STAGES, STAGES_MODULE, Stage, worker

BUDGET = 510.0  # seconds of a part; nine minutes with room for the last stage and save
LEAST = 25.0  # seconds; a stage that has less is not begun: it would only import torch
SAVE_EVERY = 2.0


class Gate:
    """Runs the stages of one part."""

    def __init__(self, record: Record, budget: float, scratch: Path, site: Path | None):
        self.record, self.scratch, self.site = record, scratch, site
        self.lines = scratch / "rows.jsonl"  # of all stages: later ones look up the limits
        self.taken = 0
        self.until = time.monotonic() + budget

    def run(self, stages: list[Stage], dry_run: bool) -> None:
        self._stage(worker("describe", 120, dry_run, title="machine"))
        self.record.name_after(_short_name(self.record.data["machine"].get("gpu")))
        for stage in stages:
            self._stage(stage)
        self.until = max(self.until, time.monotonic() + LEAST + 5)
        self._stage(worker("state", 60 if dry_run else 20, dry_run, title="state after"))
        self.record.data["finished"] = True

    def _stage(self, stage: Stage) -> None:
        entry = {"name": stage.name, "outcome": "running", "seconds": 0.0, "limit": stage.limit}
        self.record.data["stages"].append(entry)
        left = self.until - time.monotonic()
        why_not = stage.why_not or self._lacks(stage)
        why_not = why_not or (None if left > LEAST else "no time was left")
        if why_not:
            entry |= {"outcome": "left out", "why": why_not}
            self.record.leave_out(stage.name, stage.name, why_not)
            self.record.save()
            return
        print(f"{stage.name} …", flush=True)
        failures = len(self.record.data["failures"])
        try:
            self._run(stage, entry, min(stage.limit, left))
        except OSError as error:
            entry |= {"outcome": "failed", "why": str(error)}
        if entry["outcome"] == "passed" and len(self.record.data["failures"]) > failures:
            entry |= {"outcome": "failed", "why": "see failures"}
        elif entry["outcome"] != "passed":
            self.record.fail(stage.name, stage.name, entry["why"])
        self.record.save()

    def _lacks(self, stage: Stage) -> str | None:
        """Why what it needs is not there."""
        went = [e["outcome"] for e in self.record.data["stages"] if e["name"] == stage.needs]
        return f"{stage.needs} {went[-1]}" if went and went[-1] in ("failed", "timed out") else None

    def _run(self, stage: Stage, entry: dict, limit: float) -> None:
        start = time.monotonic()
        entry["limit"] = round(limit, 1)
        with self.record.log.open("ab") as log:
            log.write(f"\n=== {stage.name}: {' '.join(stage.command[1:])}\n".encode())
            log.flush()
            begin, is_new = log.tell(), False
            process = subprocess.Popen(
                self._command(stage, limit), cwd=ROOT, env=self._environment(stage), stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
            try:
                while process.poll() is None and time.monotonic() < start + limit:
                    time.sleep(0.2)
                    entry["seconds"] = round(time.monotonic() - start, 1)
                    is_new |= self._take_rows(entry)
                    if is_new and time.monotonic() > self.record.saved_at + SAVE_EVERY:
                        self.record.save()
                        is_new = False
                is_late = process.poll() is None
            finally:
                _kill(process)
            self._take_rows(entry)
        entry["seconds"] = round(time.monotonic() - start, 1)
        with self.record.log.open("rb") as log:
            log.seek(begin)
            output = log.read().decode(errors="replace")
        entry["returncode"] = process.returncode
        if is_late:
            entry |= {"outcome": "timed out", "why": f"killed after {limit:.0f} s"}
        elif stage.must_say is not None and stage.must_say not in output:
            why = f"it did not say {stage.must_say!r}: {output[-1500:]}"
            entry |= {"outcome": "failed", "why": why}
        elif bool(process.returncode) != stage.must_fail:
            entry |= {"outcome": "failed", "why": f"exit {process.returncode}: {output[-1500:]}"}
        else:
            entry["outcome"] = "passed"

    def _command(self, stage: Stage, limit: float) -> list[str]:
        """A worker is told to end a little before it would be killed, by a clock that counts its
        imports too."""
        if STAGES_MODULE not in stage.command:
            return stage.command
        until = time.monotonic() + limit - max(10.0, 0.15 * limit)
        return [*stage.command, "--rows", str(self.lines), "--until", f"{until:.0f}"]

    def _environment(self, stage: Stage) -> dict[str, str]:
        environment = os.environ | stage.environment | {"TEST_ROWS": str(self.lines)}
        environment["PYTHONUNBUFFERED"] = "1"
        environment.pop("TIM_KERNELS_BACKEND", None)
        if self.record.data["dry_run"]:
            environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        else:
            environment.pop("TRITON_INTERPRET", None)
        if self.site is not None:
            paths = [str(self.site), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        return environment

    def _take_rows(self, entry: dict) -> bool:
        """Whether there were new whole lines."""
        if not self.lines.exists():
            return False
        with self.lines.open("rb") as file:
            file.seek(self.taken)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self.taken += len(new)
        for line in new.splitlines():
            try:
                row = rows.read(json.loads(line))
            except (
                ValueError,
                KeyError,
                TypeError,
            ):  # half a line of a stage that was killed, and a whole one behind it
                row = rows.LeftOut("a row", f"unreadable: {line[:200]!r}")
            self.record.take(row, entry)
        return bool(new)


def _kill(process: subprocess.Popen) -> None:
    """The stage and whatever it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _short_name(gpu: str | None) -> str:
    """ "NVIDIA H100 80GB HBM3" → "h100"."""
    words = [word for word in (gpu or "cpu").split() if word not in ("NVIDIA", "Tesla", "GeForce")]
    return "".join(c for c in words[0].lower() if c.isalnum())


def install(wheels: Path, site: Path) -> str | None:
    """The packages among them that this machine lacks, for the length of the run; returns what
    went wrong."""
    missing = []
    for path in sorted(wheels.glob("*.whl")):
        try:
            importlib.metadata.version(path.name.partition("-")[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(path))
    if not missing:
        return None
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    pip += ["--no-compile", "--target", str(site), *missing]
    done = subprocess.run(pip, capture_output=True, text=True)
    return f"pip failed: {done.stderr[-1000:]}" if done.returncode else None


def run_part(
    part: str, out: Path, commit: str, dry_run: bool, budget: float = BUDGET,
    stages: list[Stage] | None = None, site: Path | None = None, missing: str | None = None,
) -> dict:  # fmt: skip
    """One part, with its own stages unless others are given; returns what the file holds. `missing`
    says why there are no wheels in `site`."""
    out.mkdir(parents=True, exist_ok=True)
    record = Record(out, part, commit, dry_run)
    if missing:
        record.leave_out("gate", "wheels", missing)
    record.save()
    with tempfile.TemporaryDirectory() as scratch:
        gate = Gate(record, budget, Path(scratch), site)
        try:
            gate.run(STAGES[part](dry_run) if stages is None else stages, dry_run)
        except (KeyboardInterrupt, SystemExit) as stop:
            record.fail("gate", "stopped", repr(stop))
            raise
        finally:
            record.data["ended"] = now()
            record.save()
    return record.data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to use in this run")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of a part")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    commit = args.commit or commit_hash()
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) if args.wheels else None
        options = dict(site=site, missing=install(args.wheels, site) if site else None)
        results = [
            run_part(part, args.out, commit, args.dry_run, args.budget, **options)
            for part in (FULL if args.part == "all" else (args.part,))
        ]
    print("\n\n".join(summary.of_result(result) for result in results))
    return int(any(result["failures"] for result in results))
