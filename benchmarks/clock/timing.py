"""How long a call takes, and nothing else: no cache hits, no launches, no warm-up.

Every measurement goes round several sets of inputs, as many as it takes for the whole to be far
larger than the L2 cache. On a GPU the round is captured in a CUDA graph and each replay is timed
with events, so that neither Python nor the launch latency is in it; code that cannot be captured is
timed with events alone, and says so. On a CPU it is the clock. The median of many rounds counts.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

LEAST_FOOTPRINT = 256 * 2**20  # bytes
MOST_SETS = 512
MOST_ROUNDS, FEWEST_ROUNDS = 200, 5
CPU_SETS = 2  # cores' caches are not what is compared there


class Timing(NamedTuple):
    """Milliseconds of one call: the median, and the 10th and 90th percentile over rounds."""

    ms: float
    low: float
    high: float
    rounds: int
    sets: int
    method: str  # "graph", "events" or "clock"

    def fields(self) -> dict:
        """Of a row."""
        sets = f" of {self.sets} input sets" * (self.sets > 1)
        timed = f"{self.method}, {self.rounds} rounds{sets}"
        return {"ms": self.ms, "ms_10": self.low, "ms_90": self.high, "timed": timed}


def is_cuda(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def synchronise(device: str | torch.device) -> None:
    if is_cuda(device):
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def side_stream(device: str | torch.device) -> Iterator[None]:
    """A stream that can be captured. What backward will be captured on, forward must run on."""
    if not is_cuda(device):
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def storage_bytes(tree) -> int:
    """Of the distinct storages of all tensors in a tree."""
    storages = {
        leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor)
    }
    return sum(storages.values())


def sets_needed(bytes_a_set: int, device: str | torch.device) -> int:
    """How many sets of inputs and outputs the L2 cache can not hold."""
    if not is_cuda(device):
        return CPU_SETS
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    footprint = max(4 * l2, LEAST_FOOTPRINT)
    return min(MOST_SETS, max(2, -(-footprint // max(bytes_a_set, 1))))


def copies(tensors: Sequence[Tensor], count: int) -> list[tuple[Tensor, ...]]:
    """The tensors themselves and count − 1 clones; views of one storage stay views of one."""
    sets = [tuple(tensors)]
    for _ in range(count - 1):
        clones = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in clones:
                clones[storage._cdata] = storage.clone()
        sets.append(
            tuple(
                torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
                    clones[tensor.untyped_storage()._cdata],
                    tensor.storage_offset(), tensor.size(), tensor.stride(),
                )
                for tensor in tensors
            )
        )  # fmt: skip
    return sets


def measure(
    thunks: Sequence[Callable], device: str | torch.device, seconds: float = 0.2, graph: bool = True
) -> Timing:
    """Time one call of the thunks, which do the same on different inputs.

    Inside `side_stream` on a GPU; `seconds` is about what all rounds together take.
    """
    return measure_round(*prepare(thunks, device, graph), len(thunks), seconds)


def prepare(
    thunks: Sequence[Callable], device: str | torch.device, graph: bool = True
) -> tuple[Callable, str]:
    """A round of all thunks, which have run twice when this returns, and how it is to be timed."""
    for _ in range(2):
        for thunk in thunks:
            thunk()
    synchronise(device)
    if graph and is_cuda(device) and (replay := _captured(thunks)) is not None:
        return replay, "graph"
    return lambda: [thunk() for thunk in thunks], "events" if is_cuda(device) else "clock"


def measure_round(run: Callable, method: str, sets: int, seconds: float = 0.2) -> Timing:
    """Time what `prepare` gave, for thunks on so many sets of inputs."""
    times = _clock(run, seconds) if method == "clock" else _events(run, seconds)
    return _summary(times, sets, method)


class Ratio(NamedTuple):
    """Of two calls timed by turns: their medians, and that of base / own over rounds, with the
    10th and 90th percentile."""

    base_ms: float
    ms: float
    ratio: float
    ratio_10: float
    ratio_90: float


def by_turns(
    calls: Sequence[Callable], device: str | torch.device, rounds: int = 15, least_ms: float = 0.0
) -> list[list[float]]:
    """Milliseconds of each call in every round, taken by turns and in turning order, so that what
    else the machine does falls on all alike. A turn repeats a call that is shorter than `least_ms`.
    On a CPU it is the time of this process, without what others do on the machine meanwhile.
    """
    clock = time.perf_counter if is_cuda(device) else time.process_time
    times, repeats = [[] for _ in calls], [1] * len(calls)
    for done in range(rounds + 1):
        for i in range(len(calls)) if done % 2 else reversed(range(len(calls))):
            start = clock()
            for _ in range(repeats[i]):
                calls[i]()
            synchronise(device)
            ms = max(1e-6, 1e3 * (clock() - start) / repeats[i])
            if done:
                times[i].append(ms)
            else:  # the warm-up
                repeats[i] = max(1, round(least_ms / ms))
    return times


def ratio(base: Sequence[float], own: Sequence[float]) -> Ratio:
    """Of two calls' times in the same rounds."""
    ratios = sorted(a / b for a, b in zip(base, own, strict=True))
    medians = (statistics.median(each) for each in (base, own, ratios))
    tenth = len(ratios) // 10
    return Ratio(*medians, ratios[tenth], ratios[-1 - tenth])


def _summary(times: list[float], sets: int, method: str) -> Timing:
    times = sorted(time / sets for time in times)
    low, high = times[len(times) // 10], times[-1 - len(times) // 10]
    return Timing(statistics.median(times), low, high, len(times), sets, method)


def _clock(run: Callable, seconds: float) -> list[float]:
    times = []
    until = time.perf_counter() + seconds
    for done in itertools.count(1):
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        times.append(1e3 * (now - start))
        if done == MOST_ROUNDS or (now > until and done >= FEWEST_ROUNDS):
            return times


def _captured(thunks: Sequence[Callable]) -> Callable | None:
    """A replay of all thunks, each with outputs of its own; None if it can not be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            kept = [thunk() for thunk in thunks]
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return lambda: (graph.replay(), kept)


def _events(run: Callable, seconds: float) -> list[float]:
    def event():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    start = event()
    run()
    end = event()
    end.synchronize()
    estimate = max(start.elapsed_time(end), 1e-3)
    rounds = int(min(MOST_ROUNDS, max(FEWEST_ROUNDS, 1e3 * seconds / estimate)))
    pairs = []
    for _ in range(rounds):
        start = event()
        kept = run()
        pairs.append((start, event()))
        del kept
    pairs[-1][1].synchronize()
    return [start.elapsed_time(end) for start, end in pairs]
