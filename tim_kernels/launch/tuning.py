"""Tile sizes and warps of each kernel, as data: tuning.json.

A section such as "sm_90" has what was chosen for that architecture, each entry with its source:
timings on a GPU that it names, or the resources of the compiled code under a static model, which
is a guess until somebody times it. `python -m benchmarks tune --write` makes both kinds. "default"
serves CPUs and GPUs older than every section.

A kernel without an entry for an architecture takes that of the nearest lower one: sm_89 is served
as sm_86, sm_86 as sm_80, sm_103 and sm_120 as sm_100, each where it has none of its own. All of
them compile without spills within the 99 KiB of shared memory that a program of sm_86, sm_89 and
sm_120 has; whether any of them is the fastest there, nobody has looked.

A configuration depends on the kernel and the architecture alone, never on a length, so nothing is
tuned at run time.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from .plans import forgotten_around

PATH = Path(__file__).with_name("tuning.json")
TABLE: dict[str, dict[str, dict]] = json.loads(PATH.read_text())

_forced: int | None = None  # the architecture that `as_architecture` asks for
_tried: dict[str, dict[str, int]] = {}


def configuration(kernel: str, device: torch.device) -> dict:
    """The entry of a kernel such as "swiglu", "ada_layer_norm.jvp" or "attention.jvp.80"."""
    return _tried.get(kernel) or TABLE[section(kernel, architecture(device))][kernel]


def tuned(kernel: str, device: torch.device) -> tuple[int, int]:
    """(elements of a tile, num_warps)."""
    entry = configuration(kernel, device)
    return entry["elements"], entry["num_warps"]


def source(kernel: str, device: torch.device) -> str:
    """Where the configuration of a kernel on a device comes from, in words."""
    own = architecture(device)
    name = section(kernel, own)
    words = TABLE[name][kernel].get("source", "not timed")
    return words if own is None or name == f"sm_{own}" else f"{words} ({name} for sm_{own})"


def architecture(device: torch.device) -> int | None:
    """90 for sm_90; None where there is no CUDA device and nobody asked for an architecture."""
    if _forced is not None:
        return _forced
    return _capability(device) if device.type == "cuda" else None


def has_tensor_memory(device: torch.device) -> bool:
    """Whether its tensor cores take products one by one, by tcgen05: sm_100 to sm_119."""
    return (architecture(device) or 0) // 10 in (10, 11)


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def section(kernel: str, architecture: int | None) -> str:
    """The section that serves a kernel: the highest one not above the architecture."""
    if architecture is None:
        return "default"
    own = [int(name[3:]) for name in TABLE if name != "default" and kernel in TABLE[name]]
    lower = [number for number in own if number <= architecture]
    return f"sm_{max(lower)}" if lower else "default"


@contextlib.contextmanager
def as_architecture(number: int | None) -> Iterator[None]:
    """For tools: the enclosed code gets the configurations of sm_<number>, on any device."""
    global _forced
    before, _forced = _forced, number
    try:
        with forgotten_around():
            yield
    finally:
        _forced = before


@contextlib.contextmanager
def trying(kernel: str, **configuration: int) -> Iterator[None]:
    """For tools: the enclosed code gets this configuration of a kernel."""
    before = dict(_tried)
    _tried[kernel] = configuration
    try:
        with forgotten_around():
            yield
    finally:
        _tried.clear()
        _tried.update(before)
