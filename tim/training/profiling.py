"""A trace of a few training steps, for chrome://tracing or ui.perfetto.dev."""

import logging
from pathlib import Path

from torch.profiler import profile, schedule

_log = logging.getLogger(__name__)
WAIT, WARMUP, ACTIVE = 2, 1, 3  # steps


class Profiler:
    """Within it, `step` ends a step; the trace of `ACTIVE` steps, after some to warm up, or of
    what a shorter run did, goes to `folder`."""

    def __init__(self, folder: Path, rank: int):
        self.path = folder / f"rank-{rank}.json.gz"
        self._count = 0
        self._profile: profile | None = None

    def __enter__(self) -> "Profiler":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._profile = profile(
            schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profile.start()
        return self

    def step(self) -> None:
        """The step is done; after the last one of the trace the profiler rests."""
        self._profile.step()

    def __exit__(self, *error: object) -> None:
        self._profile.stop()
        if not self.path.exists():
            _log.warning("no trace: it takes at least %d steps", WAIT + WARMUP + 1)

    def _write(self, done: profile) -> None:
        done.export_chrome_trace(str(self.path))
        _log.warning("trace of %d steps: %s", ACTIVE, self.path)
