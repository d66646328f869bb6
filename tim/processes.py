"""The processes that torchrun or accelerate launched to share one piece of work."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import distributed


@contextlib.contextmanager
def launched_group() -> Iterator[None]:
    """The group of the processes that torchrun or accelerate launched; nothing for one alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Of a module that is run: what was wrong with its input ends it without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None


class Processes(NamedTuple):
    """This process's place among those that share the work."""

    rank: int
    world_size: int

    @classmethod
    def here(cls) -> "Processes":
        """Of the group that is there; one process alone without any."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls(0, 1)
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks; each waits for the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values


def launched_device() -> str:
    """The GPU of this process where there are any, else the CPU."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return "cpu"
