"""On a CPU: every op as "auto" runs it, and whole networks, against PyTorch's own, by turns.

    python -m benchmarks cpu [--match swiglu] [--long] [--rounds 15] [--out benchmarks/results]

Ops at 256 tokens of width 768 against eager PyTorch; TiM-B networks of 256 tokens against their
published form in eager PyTorch and against torch.compile of its blocks. One core; answers are
checked first.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..cases import tasks
from ..cases.ops import OpCase, op_cases
from ..cases.peers import ONE_ROW
from ..cases.shapes import Model, Shape
from ..cases.tasks import NetworkCase
from ..clock import machine
from ..clock.machine import Limits
from ..record.provenance import commit_hash, now, save, source_hash
from ..record.rows import EAGER, Turns
from ..record.table import text
from .comparison import Contender
from .networks import AUTO, COMPILED, PUBLISHED, NetworkComparison
from .ops import OpComparison

DTYPES = torch.float32, torch.bfloat16
SHAPES = {"256 tokens of 768": Shape(1, (16, 16), (4, 32, 32), width=768, head_dim=64)}
NETWORK = Model("b-256", (16, 16), (4, 64, 64), 0, (2,))
DEPTHS, TASKS = (4, 12), (tasks.FORWARD_TASK, tasks.TRAINING[0], tasks.SAMPLING[0])
TURN_MS = 2.0  # of an op that takes less, several calls are timed together
LIMITS = Limits(1.0, 1.0)  # no share of them is asked for


def ops() -> list[OpCase]:
    """All but the one that is made for peers, where eager PyTorch has a layer norm of its own."""
    directions = "forward", "backward"
    cases = [c for dtype in DTYPES for c in op_cases(SHAPES, dtype, directions, attention=True)]
    return [case for case in cases if case.call != ONE_ROW]


def networks(is_long: bool = False) -> list[NetworkCase]:
    """Of the deeper one a forward alone, unless it may take long."""
    return [
        NetworkCase(f"TiM-B, depth {depth}", NETWORK._replace(depth=depth), 2, task, dtype=dtype)
        for depth in DEPTHS
        for task in (TASKS if is_long or depth == DEPTHS[0] else TASKS[:1])
        for dtype in DTYPES
    ]


def turns(case: OpCase | NetworkCase, rounds: int) -> list[Turns]:
    """Ours against eager PyTorch, and of a network also against torch.compile.

    Raises:
        WrongAnswer: somebody's answer is off.
    """
    if isinstance(case, NetworkCase):
        return NetworkComparison(case, "cpu", LIMITS).turns((PUBLISHED, COMPILED), AUTO, rounds)
    comparison = OpComparison(case, "cpu", LIMITS)
    op = comparison.op
    eager, ours = Contender(EAGER, op.eager), Contender("auto", op.function, "auto")
    return comparison.turns((eager,), ours, rounds, TURN_MS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--long", action="store_true", help="every task at both depths")
    parser.add_argument("--rounds", type=int, default=15, help="of an op; of a network a third")
    parser.add_argument("--match", default="", help="cases whose title and dtype contain this")
    parser.add_argument("--out", type=Path, help="a folder for <date>-cpu.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # threads that wait for one another time what else runs here
    data = {
        "format": 1, "part": "cpu", "dry_run": False, "commit": commit_hash(),
        "sources": source_hash(), "started": now(), "machine": machine.describe("cpu"),
        "load_before": os.getloadavg()[0],  # of other work: below 0.5 the times can be trusted
    }  # fmt: skip
    found = []
    for case in (*ops(), *networks(args.long)):
        if args.match in f"{case.title}, {case.dtype}":
            rounds = args.rounds if isinstance(case, OpCase) else -(-args.rounds // 3)
            for row in turns(case, rounds):
                print(f"{row.case}, {row.dtype}: {row.ratio:.2f} × {row.base}", flush=True)
                found.append(row)
    print(text(found, Turns.columns))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        data |= {"ended": now(), "rows": [row.json() for row in found]}
        save(data, args.out / f"{data['started'][:10]}-cpu.json")
