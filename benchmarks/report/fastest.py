"""Which fused backend "auto" should take for each op, from the committed results.

    python -m benchmarks fastest [--write]

On each GPU's latest measurement, the backend whose time over all shapes, forward and backward, has
the smaller geometric mean. --write stores it in tim_kernels/dispatch/fastest.json by architecture.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from tim_kernels.dispatch import backend

from ..record.provenance import ROOT
from ..record.rows import FUSED, Op, Row, load
from . import proof

TABLE = ROOT / "tim_kernels/dispatch/fastest.json"
DIRECTIONS = "forward", "backward"


def fastest(rows: Iterable[Row]) -> dict[str, str]:
    """{op: "triton" or "cuda"} of the rows where both were timed."""
    logs = defaultdict(lambda: defaultdict(dict))  # op, case, backend
    for row in rows:
        is_asked = isinstance(row, Op) and row.contender in FUSED and row.direction in DIRECTIONS
        if is_asked and row.folder in backend.OPS:
            logs[row.folder][row.case][row.contender] = math.log(row.ms)
    chosen = {}
    for op, cases in logs.items():
        both = [case for case in cases.values() if len(case) == len(FUSED)]
        if both:
            chosen[op] = min(FUSED, key=lambda name: sum(case[name] for case in both))
    return chosen


def table(results: Sequence[dict]) -> dict[str, dict[str, str]]:
    """By architecture; a result that may not be told decides nothing."""
    chosen = {}
    for gpu in proof.gpus(results):
        result = proof.latest(results, "ops", gpu)
        if result is not None and proof.why_not_proved(result, results) is None:
            name = "sm_" + result["machine"]["capability"].replace(".", "")
            chosen[name] = fastest(proof.told_rows(result, results, Op))
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into dispatch/fastest.json")
    args = parser.parse_args(argv)
    text = json.dumps(table(load()), indent=2, sort_keys=True) + "\n"
    print(text, end="")
    if args.write:
        TABLE.write_text(text)
