"""How the launchers of csrc/ launch: which kernel, blocks of how many warps, how often they loop.

The choice is made in C++ by shape and alignment; this says the same of calls in bfloat16 that are
aligned. tests/csrc holds it to what the launchers really do.
"""

import math
from typing import NamedTuple

import torch

from tim_kernels.dispatch import backend

TILE, TILE_BYTES = 32, 48  # STAGED_TOKENS and sizeof(Tile) of csrc/heads_staged.cuh
LANES = {64: 2, 72: 2, 128: 4}  # of a head
WARPS, ROWS = 4, dict(forward=1, backward=2)  # of a token: x, or its gradient as well
PERIOD = 9  # which argument
ADA_THREADS = dict(forward=128, backward=288)


class Launched(NamedTuple):
    """A launch of a kernel of csrc/ in bfloat16."""

    kernel: str  # qk_norm_rope.forward_staged
    size: str  # its first template argument
    blocks: int | None  # None: each thread has its bytes once
    warps: int = 4
    trips: int = 1  # of the longest loop
    within: tuple[int, int] | None = None  # of loops in that, as static/sass.py has them
    shared: int = 0  # dynamic, bytes

    def is_of(self, kernel: str, call: str) -> bool:
        """Whether that is the compiled kernel, by its name and template arguments."""
        size, *others = call.strip("<>").split(", ")
        types = {other for other in others if not other.isdecimal()}
        return (kernel, size, types) == (self.kernel, self.size, {"bf16"})


def launched(operator: str, args: tuple) -> Launched:
    """Of a call of an operator of csrc/, ada_layer_norm_forward or another."""
    op, _, direction = operator.rpartition("_")
    x = next(arg for arg in args if isinstance(arg, torch.Tensor))
    kernel = f"{op}.{direction}"
    match op:
        case "ada_layer_norm":
            return _ada_layer_norm(kernel, direction, x, args[-1])
        case "qk_norm_rope":
            return _heads(kernel, direction, x, args)
        case _:
            return Launched(kernel, "8", None)


def _ada_layer_norm(kernel: str, direction: str, x: torch.Tensor, share: int) -> Launched:
    launcher, width = backend.OPS["ada_layer_norm"].cuda, x.shape[-1]
    threads, shared = ADA_THREADS[direction], 0
    if direction == "forward":
        step = launcher.FORWARD_STEP
    else:
        step = launcher.BACKWARD_STEP[width]
        team = 32 if width // 8 % 32 == 0 else 16
        sums = 5 * step * -(-width // 8 // team // 4) * 4 * 4  # bytes of Sums
        shared = 8 * threads * 16 + threads * 32 + 2 * sums  # Storage: chunks, x', sums
    blocks = x.shape[0] * -(-x.shape[1] // share)
    return Launched(kernel, str(width), blocks, threads // 32, -(-share // step), None, shared)


def _heads(kernel: str, direction: str, x: torch.Tensor, args: tuple) -> Launched:
    launcher, (H, D) = backend.OPS["qk_norm_rope"].cuda, x.shape[-2:]
    share, heads, slots = args[-3:]
    heads_of = args[: 2 if direction == "forward" else 4]  # q, k, after their gradients
    sides = sum(each is not None for each in heads_of) * 2 // len(heads_of)
    columns = -(-sides * H // heads)
    blocks = x.shape[0] * -(-x.shape[1] // share) * columns
    if D not in launcher.STAGED:
        warps = -(-slots * heads * -(-D // 8) // 32)
        return Launched(kernel, "true", blocks, warps, -(-share // (launcher.TOKENS * slots)))
    lanes, is_alone = LANES[D], columns == 1
    a_side = H if is_alone else heads
    groups = (sides if is_alone else 1) * -(-a_side // (32 // lanes))
    slots = WARPS // groups
    while TILE % slots:
        slots -= 1
    tiles, row, floats = -(-share // TILE), 32 * _stride(D // lanes * 2), _stride(D // lanes * 4)
    period = args[PERIOD] or TILE + 1
    new = tiles if TILE % period else 1  # tiles whose columns are not those of the one before
    within = TILE // slots, math.ceil(D * (tiles + new) / (4 * tiles * groups * slots))
    stages = 2 if direction == "backward" and row > 2304 else 3
    shared = (
        TILE_BYTES + groups * slots * stages * ROWS[direction] * row + TILE * (lanes * floats + 16)
        + (groups * 32 + 2 * (sides if is_alone else 1) * lanes) * floats
    )  # fmt: skip
    staged = Launched(f"{kernel}_staged", str(D), blocks, groups * slots, -(-share // TILE), within)
    return staged._replace(shared=shared)


def _stride(size: int) -> int:
    """Bytes from a lane's piece of so many to the next: an odd number of accesses."""
    access = next(each for each in (16, 8, 4) if size % each == 0)
    return size if size // access % 2 else size + access
