"""Chooses the tile and the warps of every kernel: tim_kernels/launch/tuning.json.

    python -m benchmarks tune [--op swiglu] [--write]                   times them on this GPU
    python -m benchmarks tune --from gate.json --write                  what the GPU gate timed
    python -m benchmarks tune --arch 80 90 100 [--op swiglu] [--write]  compiles; no GPU needed

Candidates are a small grid of tile sizes and warps, each on the calls of cases/calls.py.

Without a GPU each is compiled for the architecture, at both published widths in bfloat16, and
judged by the static model of estimate.py, attention's tiles by that of attention.py. A
configuration that spills, or loads less than 16 bytes a thread where "default" does not, is out.
The choice holds until somebody times it.

What the compiler made a trap of, or what has not the shared memory it needs, is refused either way.
One Triton's trap can be another's code: compile a choice with every Triton that is to run it.
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what users get; Triton 3.10 will not

import torch
import triton
from triton.runtime.errors import PTXASError

from tim_kernels import use_backend
from tim_kernels.launch import tuning

from ..cases import fp8
from ..cases.calls import DIRECTIONS, Call, calls
from ..cases.shapes import PUBLISHED
from ..clock.timing import Timing, is_cuda, side_stream
from ..clock.timing import measure as time_calls
from ..record.table import Column, text
from ..static.cubin import ARCHITECTURES, compile_launch, in_processes
from ..static.launches import Launch, record_launches, through_launchers
from ..static.resources import HEAD_DIMS, refusal
from . import attention
from .attention import Tile
from .estimate import CHIPS, Chip, Reading, limits, read, slowdown, touched


class Candidate(NamedTuple):
    elements: int
    num_warps: int


TILES = {"qk_norm_rope": (576, 1152, 2304, 4608)}
TILE = 512, 1024, 2048  # of the others
WARPS = 1, 2, 4, 8
A_THREAD = 4, 64  # elements
RESOLUTION = 0.02  # of the static model: less is no reason to prefer one
NOISE = 0.01  # of a timing, likewise
LEAST_TRIED = 4  # candidates, the present one among them, for a timing to choose


def candidates(kernel: str) -> list[Candidate] | list[Tile]:
    if kernel in attention.HEAD_DIMS:
        return attention.CANDIDATES
    grid = itertools.product(TILES.get(kernel.partition(".")[0], TILE), WARPS)
    least, most = A_THREAD
    return [Candidate(n, warps) for n, warps in grid if least <= n // (32 * warps) <= most]


def kernels(ops: Iterable[str] = ()) -> list[str]:
    """Of the table, those that are tuned: of attention, the tiles of three head_dims in half
    precision; of some ops, or all."""
    table = tuning.TABLE["default"].items()
    names = (name for name, own in table if "elements" in own or name in attention.HEAD_DIMS)
    return [name for name in names if not ops or name.partition(".")[0] in ops]


def calls_of(kernel: str, device: str | torch.device = "meta", **sizes) -> list[Call]:
    """Those that its tile is chosen by, at the shape of the largest batch but for `sizes`."""
    shape = PUBLISHED["c2i-xl, batch 256"]._replace(**sizes)
    if kernel in fp8.KERNELS:
        return list(fp8.calls(shape, torch.bfloat16, device))
    return list(calls(**shape._asdict(), device=device))


def _is_of(name: str, kernel: str) -> bool:
    """Whether the table configures the launch `name` under `kernel`: an op, or one direction, or
    that at some width; the longest name that fits."""
    if name in tuning.TABLE["default"]:
        return name == kernel
    return f"{name}.".startswith(kernel.rstrip(".0123456789") + ".")


def launches(kernel: str, call: Call) -> Iterator[Launch]:
    """What a call launches, in all directions, that `kernel` of the table configures."""
    for direction in call.directions if call.op == kernel.partition(".")[0] else ():
        with use_backend("triton"), record_launches() as found:
            if call.tensors[0].is_meta:
                with through_launchers():
                    call.run(direction)
            else:
                call.run(direction)
        for launch in found:
            of = launch.name.rpartition(".")[2]  # "mix" of transition_inputs serves two
            if (of == direction or of not in DIRECTIONS) and _is_of(launch.name, kernel):
                yield launch


def choose(
    readings: dict[Candidate, list[Reading]], before: Candidate, chip: Chip
) -> Candidate | None:
    """The fastest by the model; what it can not tell from that, `before` first and then the one
    with fewest registers. None if none is fit.

    `readings` are of the same launches in the same order for each candidate.
    """

    def is_fit(candidate: Candidate) -> bool:
        pairs = zip(readings[candidate], readings[before], strict=True)
        return not any(
            own.refusal or own.spills or (old.wide and not own.wide) for own, old in pairs
        )

    slow = {fit: slowdown(readings[fit], chip) for fit in filter(is_fit, readings)}
    best = min(slow.values(), default=0.0)
    close = [candidate for candidate in slow if slow[candidate] <= best * (1 + RESOLUTION)]
    if before in close:
        return before
    return min(close, key=lambda c: max(r.registers for r in readings[c]), default=None)


def read_all(
    kernel: str, architectures: Iterable[int], processes: int
) -> dict[int, dict[Candidate, list[Reading]]]:
    """Readings of every candidate, and of the default, by architecture."""
    tried = dict.fromkeys([*candidates(kernel), usual(kernel)])
    found = {candidate: [] for candidate in tried}
    for width, head_dim in HEAD_DIMS.items():
        for call in calls_of(kernel, width=width, head_dim=head_dim):
            for candidate in tried:
                with tuning.trying(kernel, **candidate._asdict()):
                    found[candidate] += launches(kernel, call)
    tasks = [(launch, arch) for arch in architectures for own in found.values() for launch in own]
    read_in_order = iter(in_processes(read, tasks, processes))
    return {
        arch: {candidate: [next(read_in_order) for _ in own] for candidate, own in found.items()}
        for arch in architectures
    }


def chosen_by_model(
    architectures: Sequence[int], ops: Iterable[str] = (), processes: int = 1
) -> dict[int, dict[str, dict]]:
    """The choice for each architecture and kernel, as in the table; prints every candidate."""
    chosen = {arch: {} for arch in architectures}
    for kernel in kernels(ops):
        is_tiled = kernel in attention.HEAD_DIMS
        found = _read_tiles if is_tiled else read_all
        able = [a for a in architectures if a >= fp8.OLDEST or kernel not in fp8.KERNELS]
        for arch, readings in found(kernel, able, processes).items():
            if is_tiled:
                best = attention.choose(readings, attention.configured(kernel, arch), RESOLUTION)
                print(attention.table(kernel, arch, readings, best), flush=True)
            else:
                best = choose(readings, usual(kernel), CHIPS[arch])
                print(table(kernel, arch, readings, best), flush=True)
            if best is None:
                raise RuntimeError(f"no candidate of {kernel} is fit for sm_{arch}")
            chosen[arch][kernel] = best._asdict()
    return chosen


def _read_tiles(kernel: str, architectures: Sequence[int], processes: int) -> dict:
    call = attention.call(kernel)

    def launch(tile: Tile) -> Launch:
        with tuning.trying(kernel, **tile._asdict()):
            return next(launches(kernel, call))

    return attention.read_all(kernel, architectures, launch, processes)


def usual(kernel: str) -> Candidate:
    entry = tuning.TABLE["default"][kernel]
    return Candidate(entry["elements"], entry["num_warps"])


def table(kernel: str, arch: int, readings: dict, chosen: Candidate | None) -> str:
    """Each candidate's most registers and spills, and its times by the model."""

    def mean(own: list[Reading], limit: int) -> float:
        seconds = [limits(reading, CHIPS[arch]) for reading in own]
        return sum(s[limit] / s[0] for s in seconds) / len(own)

    columns = (
        Column("elements", lambda pair: pair[0].elements, "{}"),
        Column("warps", lambda pair: pair[0].num_warps, "{}"),
        Column("regs", lambda pair: max(r.registers for r in pair[1]), "{}"),
        Column("spills", lambda pair: max(r.spills for r in pair[1]), "{}"),
        Column("issue", lambda pair: mean(pair[1], 1), "{:.2f}"),
        Column("latency", lambda pair: mean(pair[1], 2), "{:.2f}"),
        Column("all", lambda pair: slowdown(pair[1], CHIPS[arch]), "{:.2f}"),
        Column("", lambda pair: "<" if pair[0] == chosen else None),
    )  # fmt: skip
    title = f"\n{kernel}, sm_{arch} as on {CHIPS[arch].name}: multiples of memory's time\n"
    return title + text(sorted(readings.items()), columns)


def measure(
    device: str | torch.device,
    seconds: float = 80.0,
    ops: Iterable[str] = (),
    note: Callable[[dict], None] = lambda result: None,
    **shape,
) -> dict:
    """Time candidates on this device, each kernel on its heaviest call in each direction.

    Every kernel has an equal share of `seconds`, compilation included; its candidates have their
    turn in order of their distance from the present configuration, which is always timed.

    Returns "source", "architecture", "chosen" (kernel: elements, num_warps), "refused" and
    "timings", one for each kernel launched and candidate, in milliseconds; `note` gets the same
    after every kernel. `shape` goes to `calls_of`.
    """
    device = torch.device(device)
    start = time.monotonic()
    names = [n for n in kernels(ops) if n not in fp8.KERNELS or fp8.why_not(device) is None]
    where = torch.cuda.get_device_name(device) if is_cuda(device) else "a CPU"
    software = f"torch {torch.__version__}, Triton {triton.__version__}"
    result = {
        "source": f"timed on {where}, {date.today()}, {software}",
        "architecture": tuning.architecture(device), "chosen": {}, "refused": [], "timings": [],
    }  # fmt: skip
    for done, kernel in enumerate(names, start=1):
        until = start + seconds * done / len(names)
        is_tiled = kernel in attention.HEAD_DIMS
        of = [attention.call(kernel, device)] if is_tiled else calls_of(kernel, device, **shape)
        own = _time_kernel(kernel, of, device, until, result["refused"])
        if len(own) >= LEAST_TRIED:  # else nothing was compared
            result["chosen"][kernel] = fastest(own)._asdict()
        result["timings"] += [
            {"kernel": kernel, "launch": launch} | candidate._asdict() | timing._asdict()
            for candidate, by_launch in own.items()
            for launch, timing in by_launch.items()
        ]
        note(result)
    return result


def _time_kernel(
    kernel: str, known: Sequence[Call], device: torch.device, until: float, refused: list[dict]
) -> dict[Candidate | Tile, dict[str, Timing]]:
    """Of each candidate that has its turn, the present one first, each launch by its name."""
    if kernel in attention.HEAD_DIMS:
        present = attention.configured(kernel, tuning.architecture(device))
    else:
        present = Candidate(*tuning.tuned(kernel, device))

    def distance(candidate: Candidate | Tile) -> float:
        pairs = zip(candidate, present, strict=True)
        return sum(abs(math.log2(a / b)) for a, b in pairs if a and b)

    heaviest: dict[str, tuple[int, Call]] = {}
    for call in known:
        for launch in launches(kernel, call):
            most = heaviest.get(launch.name, (-1, call))
            heaviest[launch.name] = max(most, (touched(launch), call), key=lambda pair: pair[0])
    found = {}
    for candidate in sorted({present, *candidates(kernel)}, key=distance):
        if found and time.monotonic() > until:
            break
        own: dict[str, Launch] = {}
        for name, (_, call) in heaviest.items():
            with tuning.trying(kernel, **candidate._asdict()):
                own[name] = next(each for each in launches(kernel, call) if each.name == name)
        reasons = filter(None, (why_not(launch, device) for launch in own.values()))
        if reason := next(reasons, None):
            refused.append({"kernel": kernel, "why": reason} | candidate._asdict())
            continue
        found[candidate] = {}
        for name, launch in own.items():
            with side_stream(device):
                found[candidate][name] = time_calls([launch.run], device, seconds=0.05)
    return found


def why_not(launch: Launch, device: torch.device) -> str | None:
    """Why a device cannot run it: a trap would end the process."""
    arch = tuning.architecture(device)
    if arch is None:  # the interpreter
        return None
    try:
        return refusal(compile_launch(launch, arch), arch, launch.options["num_warps"])
    except PTXASError as error:
        return f"{error}"[:200]


def fastest(timings: dict[Candidate, dict[str, Timing]]) -> Candidate:
    """By the launches' times relative to those of the first candidate, which has to be beaten."""
    present = next(iter(timings))

    def relative(candidate: Candidate) -> float:
        own, usual = timings[candidate], timings[present]
        return sum(own[name].ms / usual[name].ms for name in usual) / len(usual)

    best = min(timings, key=relative)
    return best if relative(best) < 1 - NOISE else present


def write(path: Path, architecture: int, chosen: dict[str, dict], source: str) -> list[str]:
    """Put entries into the table. What was timed stays unless this was timed as well; returns
    what stayed."""
    table = json.loads(path.read_text())
    section, kept = table.setdefault(f"sm_{architecture}", {}), []
    for kernel, configuration in chosen.items():
        was_timed = section.get(kernel, {}).get("source", "").startswith("timed")
        if was_timed and not source.startswith("timed"):
            kept.append(kernel)
        else:
            section[kernel] = configuration | {"source": source}
    path.write_text(_text(table))
    return kept


def _text(table: dict[str, dict[str, dict]]) -> str:
    """One entry a line, in the order of the default ones."""
    order = {kernel: i for i, kernel in enumerate(table["default"])}
    sections = []
    for name, entries in table.items():
        kernels = sorted(entries, key=lambda kernel: order.get(kernel, len(order)))
        lines = (f"    {json.dumps(kernel)}: {json.dumps(entries[kernel])}" for kernel in kernels)
        sections.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, help="compile for")
    parser.add_argument("--from", type=Path, dest="result", help="a JSON file that the gate wrote")
    parser.add_argument("--op", nargs="+", default=[], help="ada_layer_norm, …; all by default")
    parser.add_argument("--write", action="store_true", help="put the choice into the table")
    parser.add_argument("--table", type=Path, default=tuning.PATH, help="which one, if another")
    parser.add_argument("--seconds", type=float, default=80.0, help="of timing, on a GPU")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    if args.result:
        result = json.loads(args.result.read_text()).get("tuning")
        if not result:
            parser.error(f"{args.result} holds no tuning: the gate's ops and short parts make it")
        source, found = result["source"], {result["architecture"]: result["chosen"]}
    elif args.arch or not torch.cuda.is_available():
        source = f"compiled with Triton {triton.__version__}, not timed"
        found = chosen_by_model(args.arch or ARCHITECTURES, args.op, args.processes)
    else:
        result = measure("cuda", args.seconds, args.op)
        print(json.dumps(result, indent=1))
        source, found = result["source"], {result["architecture"]: result["chosen"]}
    for arch, own in found.items():
        if args.write and (kept := write(args.table, arch, own, source)):
            print(f"sm_{arch} keeps what was timed: {', '.join(kept)}")
