"""Which tiles of float32 attention's tangent spill, by architecture; compiled, not measured.

    python -m benchmarks spills [--arch 80 86 89 90 100 120] [--head-dim 72 128]

Each cell has bytes of local memory a thread, "trap" where the compiler left none of the code, and
KiB where a program asks for more shared memory than there is. The configured tile is marked.
"""

import argparse
import itertools
import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what users get; Triton 3.10 will not

import torch
import triton
from triton.runtime.errors import PTXASError

from tim_kernels import attention
from tim_kernels.launch import tuning

from ..record.table import Column, text
from .cubin import ALL, compile_launch, in_processes
from .launches import Launch, launches_on
from .resources import refusal

KINDS = {72: "attention.jvp.float32.80", 128: "attention.jvp.float32.128"}  # by head_dim


class Tile(NamedTuple):
    """Queries and keys, channels that q·kᵀ takes at a time (0 for all), warps."""

    rows: int
    columns: int
    chunk: int
    num_warps: int


TILES = (
    Tile(16, 16, 16, 4), Tile(32, 16, 16, 4), Tile(32, 16, 16, 8), Tile(64, 16, 16, 4),
    Tile(32, 32, 16, 4), Tile(32, 16, 0, 4),
)  # fmt: skip


def launch(head_dim: int, dtype: torch.dtype, arch: int, tile: Tile | None = None) -> Launch:
    """Of attention's tangent, with a gradient to come; the configured tile unless given."""
    q, k, v, *tangents = torch.empty(6, 2, 256, 4, head_dim, dtype=dtype, device="meta")
    q.requires_grad_()
    trying = {} if tile is None else dict(tile._asdict(), num_stages=2)
    run = partial(torch.func.jvp, attention, (q, k, v), tuple(tangents))
    with tuning.trying(KINDS.get(head_dim, ""), **trying):
        return launches_on(arch, run)[0]


def configured(head_dim: int, arch: int) -> Tile:
    entry = tuning.TABLE[tuning.section(KINDS[head_dim], arch)][KINDS[head_dim]]
    return Tile(*(entry[name] for name in Tile._fields))


def cell(head_dim: int, tile: Tile, arch: int) -> str:
    try:
        found = compile_launch(launch(head_dim, torch.float32, arch, tile), arch)
    except PTXASError:
        return "trap"
    if found.is_trap:
        return "trap"
    if refusal(found, arch, tile.num_warps):
        return f"{found.shared // 1024} KiB"
    mark = " *" if tile == configured(head_dim, arch) else ""
    return f"{found.spills}{mark}"


def rows(head_dims: Iterable[int], architectures: Sequence[int], processes: int) -> list[dict]:
    keys = list(itertools.product(head_dims, TILES))
    tasks = [(*key, arch) for key in keys for arch in architectures]
    cells = iter(in_processes(cell, tasks, processes))
    return [
        {"head_dim": head_dim, **tile._asdict(), **{f"sm_{arch}": next(cells)
                                                    for arch in architectures}}
        for head_dim, tile in keys
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ALL, choices=ALL)
    parser.add_argument("--head-dim", type=int, nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    print(f"bytes a thread spills, compiled with Triton {triton.__version__}, not measured")
    names = "head_dim", *Tile._fields, *(f"sm_{arch}" for arch in args.arch)
    columns = [Column(name, lambda row, name=name: row[name], "{}") for name in names]
    print(text(rows(args.head_dim, args.arch, args.processes), columns))
