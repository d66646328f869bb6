"""How long a launch takes, guessed from its compiled code: no GPU needed.

After Hong and Kim (ISCA 2009), a launch takes about as long as the longest of these things, joined
by a smooth maximum:

- memory: the bytes that it touches, each once, over the bandwidth;
- issue: the instructions that its warps execute, four a clock and multiprocessor;
- latency: what one program takes alone (its rounds of loads, each a latency; its instructions in
  turn; its barriers), as often as a multiprocessor has to take new programs. The latency is that of
  memory for the first read of a byte, that of the cache for what programs read again. Copies ahead
  into shared memory, each byte's first read, pass while the program works: the longer of the two.
  That is Little's law: too few bytes in flight, and latency is the longest;
- the units behind issue: load and store (128 bytes or 32 lanes a clock, so that an access of fewer
  than 4 bytes a lane wastes the rest), special functions, float32, integers and float64.

The model knows neither bank conflicts nor what a cache holds for long enough.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..static.cubin import Resources, compile_and_read
from ..static.launches import Launch
from ..static.resources import occupancy, refusal
from ..static.sass import Executed, executed


class Chip(NamedTuple):
    """Multiprocessors and bytes per second by the datasheet; clocks per second, about, at work."""

    name: str
    multiprocessors: int
    bandwidth: float
    clock: float
    fma: int = 128  # lanes a clock and multiprocessor: CUDA programming guide, "Throughput of
    double: int = 64  # Native Arithmetic Instructions", by compute capability


CHIPS = {
    80: Chip("A100 SXM 80 GB", 108, 2.039e12, 1.4e9, fma=64, double=32),
    90: Chip("H100 SXM", 132, 3.35e12, 1.7e9),
    100: Chip("B200", 148, 8.0e12, 1.8e9),
}
MUFU = 16  # lanes likewise, of all three: rsqrt, exp2, …
ALU = 64  # integers, logic, comparisons
ISSUE = 4  # instructions: a multiprocessor has four schedulers, H100 white paper
# What the model assumes of all of them, in round numbers:
LATENCY = 700e-9  # seconds of a load from memory under load
CACHED = 40  # clocks of one from the nearest cache
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
    loaded: int = 0  # bytes a lane from global memory, and to it
    stored: int = 0
    accesses: int = 0  # of global memory
    lsu: float = 0  # clocks of the load and store units for each warp, then instructions
    mufu: int = 0
    fma: int = 0
    alu: int = 0
    double: int = 0
    copied: int = 0  # of the bytes loaded, by copies ahead into shared memory, and waits for those
    waits: float = 0

    @property
    def first(self) -> float:
        """The share of its accesses that is not of bytes which were accessed before; beside copies,
        which are of each byte once as stores are, of its loads alone."""
        lanes = self.programs * self.warps * 32
        once = lanes * (self.copied + self.stored) if self.copied else 0
        moved = lanes * (self.loaded + self.stored) - once
        return min(1, max(0, self.bytes - once) / moved) if moved else 1

    @property
    def width(self) -> float:
        """Bytes a lane of an access to global memory, on average."""
        return (self.loaded + self.stored) / max(1, self.accesses)

    @property
    def in_flight(self) -> float:
        """Bytes that a multiprocessor waits for at a time, if all its programs do."""
        lanes = self.resident * self.warps * 32
        if self.copied:
            return lanes * self.copied / max(1, self.waits)
        return lanes * self.loaded / max(1, self.rounds)


class Seconds(NamedTuple):
    """Of a launch, by what could limit it."""

    memory: float
    issue: float
    latency: float
    lsu: float
    mufu: float
    fma: float
    alu: float
    double: float


def together(parts: Iterable[float]) -> float:
    """Their smooth maximum."""
    return sum(part**SMOOTHNESS for part in parts) ** (1 / SMOOTHNESS)


def limits(reading: Reading, chip: Chip) -> Seconds:
    share = reading.programs / chip.multiprocessors
    serial = reading.instructions * INTERVAL + reading.barriers * BARRIER
    wait = reading.first * LATENCY + (1 - reading.first) * CACHED / chip.clock
    alone = reading.rounds * wait + max(serial / chip.clock, reading.waits * LATENCY)
    clocks = (
        reading.lsu, reading.mufu * 32 / MUFU, reading.fma * 32 / chip.fma,
        reading.alu * 32 / ALU, reading.double * 32 / chip.double,
    )  # fmt: skip
    units = (share * reading.warps * each / chip.clock for each in clocks)
    issue = share * reading.warps * reading.instructions / ISSUE / chip.clock
    latency = max(1, share / reading.resident) * alone
    return Seconds(reading.bytes / chip.bandwidth, issue, latency, *units)


def slowdown(readings: Iterable[Reading], chip: Chip) -> float:
    """How much longer than memory alone the launches take by the model, on average."""
    ratios = []
    for reading in readings:
        seconds = limits(reading, chip)
        ratios.append(together(seconds) / seconds.memory)
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
    run = executed(sass, trips(launch))
    warps, programs = launch.options["num_warps"], math.prod(launch.grid)
    return reading(touched(launch), programs, warps, resources, run, arch)


def reading(
    touched: int, programs: int, warps: int, resources: Resources, run: Executed, arch: int
) -> Reading:
    """One launch, from what its machine code says."""
    resident = max(1, occupancy(resources, warps, arch) // warps)
    return Reading(
        touched, programs, warps, resident,
        resources.registers, resources.spills, run.instructions, run.barriers, run.rounds,
        resources.wide_loads, refusal(resources, arch, warps), run.loaded, run.stored,
        run.wide + run.narrow, run.lsu, run.mufu, run.fma, run.alu, run.double,
        run.copied, run.waits,
    )  # fmt: skip
