"""How long a launch takes, guessed from its compiled code: no GPU needed.

After Hong and Kim (ISCA 2009), a launch takes about as long as the longest of three things, joined
by a smooth maximum:

- memory: the bytes that it touches, each once, over the bandwidth;
- issue: the instructions that its warps execute, four a clock and multiprocessor;
- latency: what one program takes alone (its rounds of loads, each a latency of memory; its
  instructions in turn; its barriers), as often as a multiprocessor has to take new programs.
  That is Little's law: too few bytes in flight, and latency is the longest.

The model knows neither caches nor bank conflicts nor what a slow instruction costs.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..static.cubin import compile_and_read
from ..static.launches import Launch
from ..static.resources import occupancy, refusal
from ..static.sass import executed


class Chip(NamedTuple):
    """Multiprocessors and bytes per second by the datasheet; clocks per second, about, at work."""

    name: str
    multiprocessors: int
    bandwidth: float
    clock: float


CHIPS = {
    80: Chip("A100 SXM 80 GB", 108, 2.039e12, 1.4e9),
    90: Chip("H100 SXM", 132, 3.35e12, 1.7e9),
    100: Chip("B200", 148, 8.0e12, 1.8e9),
}
# What the model assumes of all of them, in round numbers:
LATENCY = 700e-9  # seconds of a load from memory under load
INTERVAL = 2  # clocks between a warp's instructions, some of which wait for the one before
BARRIER = 40  # clocks
SMOOTHNESS = 4  # of the maximum: two equal limits make 1.19 of either


class Reading(NamedTuple):
    """One launch of a candidate, compiled."""

    bytes: int  # that the launch touches
    programs: int
    warps: int  # of a program
    resident: int  # programs on a multiprocessor
    registers: int
    spills: int
    instructions: int  # that each warp executes, and so on
    barriers: int
    rounds: int
    wide: int
    refusal: str | None = None  # why the GPU cannot run it


def limits(reading: Reading, chip: Chip) -> tuple[float, float, float]:
    """Seconds of the launch by memory, issue and latency."""
    share = reading.programs / chip.multiprocessors
    issue = share * reading.warps * reading.instructions / 4 / chip.clock
    serial = reading.instructions * INTERVAL + reading.barriers * BARRIER
    alone = reading.rounds * LATENCY + serial / chip.clock
    return reading.bytes / chip.bandwidth, issue, max(1, share / reading.resident) * alone


def slowdown(readings: Iterable[Reading], chip: Chip) -> float:
    """How much longer than memory alone the launches take by the model, on average."""
    ratios = []
    for reading in readings:
        seconds = limits(reading, chip)
        ratios.append(sum(s**SMOOTHNESS for s in seconds) ** (1 / SMOOTHNESS) / seconds[0])
    return sum(ratios) / len(ratios)


def touched(launch: Launch) -> int:
    """Bytes of a launch's tensors."""
    tensors = (x for x in launch.arguments.values() if isinstance(x, torch.Tensor))
    return sum(x.nbytes for x in tensors)


def trips(launch: Launch) -> int:
    """Of the loops of a kernel: over the tiles of a program, or the blocks of heads of a token."""
    a = launch.arguments
    if "tokens_per_program" in a and launch.name.endswith(".backward"):
        return a["tokens_per_program"] // a.get("ROWS", a.get("T"))
    return a["H"] // a["HB"] if "HB" in a else a.get("tiles", 1)


def read(launch: Launch, arch: int) -> Reading:
    """Compile a launch for sm_<arch> and read it."""
    resources, sass = compile_and_read(launch, arch)
    run, warps = executed(sass, trips(launch)), launch.options["num_warps"]
    resident = max(1, occupancy(resources, warps, arch) // warps)
    return Reading(
        touched(launch), math.prod(launch.grid), warps, resident,
        resources.registers, resources.spills, run.instructions, run.barriers, run.rounds,
        resources.wide_loads, refusal(resources, arch),
    )  # fmt: skip
