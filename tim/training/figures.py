"""The figures of the steps between two lines of the log, without a wait for the device."""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

TERMS = ("loss", "weighted", "projection", "denoising", "squared", "cosine", "grad_norm")
# The unweighted loss by t − r: none, up to a third, to two thirds, to all of the time there is.
DISTANCES = ("instant", "short", "middle", "long")
_GIB = 2**30


def by_distance(loss: Tensor, t: Tensor, r: Tensor, time: float) -> Tensor:
    """For each of DISTANCES the sum of a loss (B,) over its samples, and their numbers, (8,)."""
    third = torch.ceil(3 * (t - r) / time).clamp(max=3)
    is_of = third[:, None] == torch.arange(len(DISTANCES), device=t.device)
    return torch.cat(((is_of * loss[:, None]).sum(dim=0), is_of.sum(dim=0)))


def means_by_distance(sums: list[float]) -> dict[str, float]:
    """Of what `by_distance` gave, summed or averaged over steps; without those of no samples."""
    losses, numbers = sums[: len(DISTANCES)], sums[len(DISTANCES) :]
    each = zip(DISTANCES, losses, numbers, strict=True)
    return {name: loss / number for name, loss, number in each if number}


class Stopwatch:
    """Seconds of the device (of the host, on a CPU) within its spans; read it after a wait."""

    def __init__(self, device: torch.device):
        self.is_cuda = device.type == "cuda"
        self._spans: list[tuple] = []

    @contextlib.contextmanager
    def span(self) -> Iterator[None]:
        """Count what is inside."""
        start = self._now()
        yield
        self._spans.append((start, self._now()))

    def _now(self):
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Of all spans so far."""
        if self.is_cuda:
            return sum(start.elapsed_time(end) for start, end in self._spans) / 1000
        return sum(end - start for start, end in self._spans)


class Window:
    """What a line of the log sums up: `terms` of every step, left on the device, and times."""

    def __init__(self, device: torch.device, images: int = 0):
        self.device, self._images = device, images
        self.terms: list[Tensor] = []
        self.loading, self.encoding = Stopwatch(torch.device("cpu")), Stopwatch(device)
        self._start = time.perf_counter()

    def first_not_finite(self) -> int | None:
        """Which of the steps has a term that is not finite; waits for the device."""
        finite = torch.stack(self.terms).isfinite().all(dim=1)
        return None if finite.all() else int(finite.int().argmin())

    def machine(self, images: int) -> dict[str, float]:
        """Speed, waits and memory of this process since the window opened; `images` seen by now."""
        seconds = time.perf_counter() - self._start
        found = {
            "images_per_second": round((images - self._images) / seconds, 1),
            "loading_share": round(self.loading.seconds() / seconds, 4),
            "encoding_share": round(self.encoding.seconds() / seconds, 4),
        }
        if self.device.type == "cuda":
            memory = torch.cuda.memory_stats(self.device)
            found |= {
                "peak_active_gib": round(memory["active_bytes.all.peak"] / _GIB, 3),
                "peak_reserved_gib": round(memory["reserved_bytes.all.peak"] / _GIB, 3),
                "alloc_retries": memory["num_alloc_retries"],
                "out_of_memory": memory["num_ooms"],
            }
        return found
