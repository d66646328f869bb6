"""What the commands share: errors in one line, the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from omegaconf.errors import OmegaConfBaseException

from tim.processes import launched_device

Device = Annotated[
    str | None, typer.Option(help="cuda, cpu, …; by default a GPU for each process.")
]
Results = Annotated[
    Path, typer.Option("--output", help="A folder for the results; a stopped run goes on from it.")
]
LeaveOut = Annotated[
    bool,
    typer.Option(
        "--leave-out",
        help="Go on without what is missing, no item or damaged; the result counts it.",
    ),
]

_EXPECTED = (
    ValueError, OSError, ImportError, ArithmeticError, OmegaConfBaseException,
    torch.OutOfMemoryError,
)  # fmt: skip


@contextmanager
def errors_without_traceback() -> Iterator[None]:
    from tim_kernels import BackendUnavailable

    try:
        yield
    except BackendUnavailable as error:
        fail(f"{error}; TIM_KERNELS_BACKEND=auto takes what this machine has", 2)
    except KeyboardInterrupt as stop:
        is_saved = hasattr(stop, "exit_code")  # a run's own, which leaves what it has done
        typer.echo(f"{stop}; the same command goes on from it" if is_saved else "stopped", err=True)
        raise typer.Exit(getattr(stop, "exit_code", 130)) from None
    except _EXPECTED as error:
        fail(error, 1)


def fail(error: Exception | str, code: int) -> NoReturn:
    """End with one line."""
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code) from None


def device_of(name: str | None) -> str:
    """What is asked for; "cuda" is this process's GPU, None is that too, or the CPU without any."""
    check_device(name or "cpu")
    return launched_device() if name in (None, "cuda") else name


def check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
        raise typer.BadParameter(f"device {name!r}: {str(error).splitlines()[0]}") from None
