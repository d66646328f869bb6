"""Tiles of attention's tangent, judged by their compiled code: no GPU needed.

A program holds a tile of queries and walks over tiles of keys. What a tile of keys takes is about
the longest of these things, joined by a smooth maximum as in estimate.py, in clocks:

- products: six of rows × columns × lanes over what the tensor cores multiply, and two with columns
  of ones that sum. On sm_90 the operands of q·kᵀ come from shared memory, at 128 bytes a clock:
  fewer than 64 columns wait for q; and a product with few lanes takes as long as one with 32;
- issue: the instructions of a trip through the loop, four a clock;
- lsu, mufu: those of the load and store units and of the special functions, as in estimate.py;
- loads: the tiles of k, v and their tangents at what the second-level cache gives, an assumption;
- latency: what a warp does in turn, its products, its other instructions and its barriers, hidden
  by the other programs on the multiprocessor alone. A warp of sm_80 waits for its own products; on
  sm_90 and sm_100 for those of the whole program, whose warps meet at a barrier behind them, and
  on sm_100 for the answer that they are done, besides.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from triton.runtime.errors import PTXASError

from tim_kernels.launch import tuning

from ..cases.calls import Call, calls
from ..record.table import Column, text
from ..static.cubin import compile_and_read, in_processes
from ..static.launches import Launch
from ..static.resources import occupancy, refusal
from ..static.sass import of_a_trip
from .estimate import BARRIER, CHIPS, INTERVAL, MUFU, together

HEAD_DIMS = {"attention.jvp.64": 64, "attention.jvp.80": 72, "attention.jvp.128": 128}
MULTIPLIED = {80: 1024, 90: 2048, 100: 4096}  # bfloat16 a clock and multiprocessor, by datasheets
LOADED = 24  # bytes a clock and multiprocessor from the second-level cache, about
READ = 128  # bytes a clock from shared memory
NARROWEST = {80: 8, 90: 32, 100: 32}  # lanes that a product takes the time of, about
ANSWER = 250  # clocks from tcgen05's last product to whoever waits for it, about
PAIRS = 4096  # of a query and a key, that clocks are told for
LIMITS = "products", "issue", "loads", "lsu", "mufu", "latency"  # fields of Reading
SHAPE = dict(batch=32, grid=(16, 16), heads=16)


class Tile(NamedTuple):
    rows: int
    columns: int
    num_warps: int
    num_stages: int
    chunk: int = 0


SIZES = (64, 32, 4), (64, 64, 4), (128, 16, 8), (128, 32, 8), (128, 64, 8)
CANDIDATES = [Tile(*size, stages) for size in SIZES for stages in (2, 3)]


class Reading(NamedTuple):
    """A tile, compiled; clocks are of a multiprocessor for PAIRS."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    warps: int = 0  # that a multiprocessor holds
    instructions: int = 0  # that each warp executes for a tile of keys
    products: float = 0.0
    issue: float = 0.0
    loads: float = 0.0
    lsu: float = 0.0
    mufu: float = 0.0
    latency: float = 0.0
    refusal: str | None = None

    @property
    def clocks(self) -> float:
        return together(getattr(self, name) for name in LIMITS)


def configured(kernel: str, arch: int | None) -> Tile:
    entry = tuning.TABLE[tuning.section(kernel, arch)][kernel]
    return Tile(*(entry[name] for name in Tile._fields))


def call(kernel: str, device: str | torch.device = "meta", **shape) -> Call:
    """Attention of a head_dim that the kernel's tile serves."""
    head_dim, shape = HEAD_DIMS[kernel], SHAPE | shape
    width = shape.pop("heads") * head_dim
    made = calls(width=width, head_dim=head_dim, device=device, **shape)
    return next(each for each in made if each.op == "attention")


def read(launch: Launch, arch: int) -> Reading:
    try:
        resources, sass = compile_and_read(launch, arch)
    except PTXASError:
        return Reading(refusal="the assembler gave up on it")
    a, warps = launch.arguments, launch.options["num_warps"]
    if reason := refusal(resources, arch, warps):
        return Reading(resources.registers, resources.spills, resources.shared, refusal=reason)
    rows, columns, lanes = a["ROWS"], a["COLUMNS"], a["A"] + a["B"]
    share, trip = PAIRS / (rows * columns), of_a_trip(sass)
    rate = MULTIPLIED[arch] / (2 if arch == 100 and rows < 128 else 1)  # tcgen05 has 128 rows
    lane = rows * columns / rate
    wait = (rows + columns * rows / 64) * lanes * 2 / READ if arch == 90 else 0  # 64 rows of wgmma
    wide, narrow, ones = (max(n, NARROWEST[arch]) if n else 0 for n in (a["A"], a["B"], a["ONES"]))
    products = 3 * max(lanes * lane, wait) + (3 * (wide + narrow) + 2 * ones) * lane
    awaited = products / (warps / 4) if arch == 80 else products
    serial = trip.instructions * INTERVAL + trip.barriers * BARRIER + trip.answers * ANSWER
    resident = occupancy(resources, warps, arch)
    return Reading(
        resources.registers, resources.spills, resources.shared,
        resident, trip.instructions,
        share * products, share * trip.instructions * warps / 4,
        share * 4 * columns * a["D"] * 2 / LOADED,
        share * trip.lsu * warps, share * trip.mufu * warps * 32 / MUFU,
        share * (awaited + serial) / max(1, resident // warps),
    )  # fmt: skip


def choose(readings: dict[Tile, Reading], before: Tile, resolution: float) -> Tile | None:
    """The fastest by the model that neither spills nor is refused; `before` unless another is
    faster by more than the model can tell."""
    fit = {tile: r.clocks for tile, r in readings.items() if not (r.refusal or r.spills)}
    best = min(fit, key=fit.get, default=None)
    if best is not None and before in fit and fit[before] <= fit[best] * (1 + resolution):
        return before
    return best


def read_all(
    kernel: str, architectures: Iterable[int], launch, processes: int
) -> dict[int, dict[Tile, Reading]]:
    """Every candidate, and the tiles that are configured, by architecture; `launch(tile)` makes
    a launch of one."""
    tried = {arch: dict.fromkeys([*CANDIDATES, configured(kernel, arch)]) for arch in architectures}
    launches = {tile: launch(tile) for tiles in tried.values() for tile in tiles}
    tasks = [(launches[tile], arch) for arch, tiles in tried.items() for tile in tiles]
    found = iter(in_processes(read, tasks, processes))
    return {arch: {tile: next(found) for tile in tiles} for arch, tiles in tried.items()}


def table(kernel: str, arch: int, readings: dict[Tile, Reading], chosen: Tile | None) -> str:
    columns = [
        *(Column(name, lambda pair, name=name: getattr(pair[0], name), "{}")
          for name in ("rows", "columns", "num_warps", "num_stages")),
        *(Column(name, lambda pair, name=name: getattr(pair[1], name), "{}")
          for name in ("registers", "spills", "shared", "warps", "instructions")),
        *(Column(name, lambda pair, name=name: getattr(pair[1], name), "{:,.0f}")
          for name in ("products", "issue", "loads", "latency", "clocks")),
        Column("", lambda pair: "<" if pair[0] == chosen else pair[1].refusal),
    ]  # fmt: skip
    title = (
        f"\n{kernel}, head_dim {HEAD_DIMS[kernel]}, sm_{arch} as on {CHIPS[arch].name}: warps of a "
        f"multiprocessor, instructions\nof a warp for a tile of keys, clocks for {PAIRS} pairs\n"
    )
    return title + text(sorted(readings.items()), columns)
