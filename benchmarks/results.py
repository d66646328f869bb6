"""Rows of results: which belong together, and how they compare."""

import json
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).with_name("results")
EAGER, COMPILE = "eager", "torch.compile"
FUSED = ("triton", "cuda")
GROUP = {"op": ("op", "direction", "shape"), "model": ("model", "batch", "task")}


def fill_ratios(rows: Iterable[dict]) -> None:
    """Give each row `vs_eager` and `vs_compile`: how many times longer the other one takes."""
    rows = [row for row in rows if row.get("kind") in GROUP]
    times = {(*_group(row), row["contender"]): row["ms"] for row in rows}
    for row in rows:
        for name, other in (("vs_eager", EAGER), ("vs_compile", COMPILE)):
            time = times.get((*_group(row), other))
            row[name] = None if time is None else time / row["ms"]


def _group(row: dict) -> tuple:
    return row["kind"], *(row[name] for name in GROUP[row["kind"]])


def ratios(row: dict) -> str:
    """The two ratios in 16 columns."""
    values = (row.get("vs_eager"), row.get("vs_compile"))
    return "".join(f"{'':>8}" if value is None else f"{value:>8.2f}" for value in values)


def load(folder: Path = RESULTS) -> list[dict]:
    """The committed results, oldest first; dry runs are none."""
    paths = sorted(folder.glob("*.json"))
    results = [json.loads(path.read_text()) | {"file": path.name} for path in paths]
    results = [result for result in results if not result.get("dry_run")]
    return sorted(results, key=lambda result: result["started"])
