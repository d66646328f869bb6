"""What the commands share: errors in one line, the device."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from omegaconf.errors import OmegaConfBaseException
from typer.core import TyperGroup

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

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
_EXPECTED = (
    ValueError, OSError, ImportError, ArithmeticError, OmegaConfBaseException,
    torch.OutOfMemoryError,
)  # fmt: skip


_UsageError = typer.BadParameter.__base__  # click's, of which typer may have its own


class Commands(TyperGroup):
    """A group whose errors of usage are one line, as all others are."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **options)
        try:
            code = super().main(*args, standalone_mode=False, **options)
        except _UsageError as error:
            message, path = error.format_message(), error.ctx.command_path if error.ctx else "tim"
            if message:  # none where the help was shown in place of it
                line = " ".join(f"error: {message}".split()).removesuffix(".")
                typer.echo(f"{line} ({path} -h says more)", err=True)
            code = error.exit_code
        sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def errors_without_traceback() -> Iterator[None]:
    from tim_kernels import BackendUnavailable

    try:
        with _ended_bars():
            yield
    except BackendUnavailable as error:
        fail(f"{error}; TIM_KERNELS_BACKEND=auto takes what this machine has", 2)
    except KeyboardInterrupt as stop:
        is_saved = hasattr(stop, "exit_code")  # a run's own, which leaves what it has done
        typer.echo(f"{stop}; the same command goes on from it" if is_saved else "stopped", err=True)
        raise typer.Exit(getattr(stop, "exit_code", 130)) from None
    except BrokenPipeError:  # who reads the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except _EXPECTED as error:
        fail(error, 1)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # of the CPU: torch has no class for it
            raise
        fail("this machine's memory is too small for it", 1)


@contextmanager
def _ended_bars() -> Iterator[None]:
    """Progress bars that an error cut off end before it is told."""
    try:
        yield
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        raise


def fail(error: Exception | str, code: int) -> NoReturn:
    """End with one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:  # without its number
        error = f"{error.filename}: {error.strerror}"
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code) from None


def say(text: object) -> None:
    """Print, by the first of the launched processes alone."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text)


def device_of(name: str | None) -> str:
    """What is asked for; "cuda" is this process's GPU, None is that too, or the CPU without any."""
    check_device(name or "cpu")
    return launched_device() if name in (None, "cuda") else name


def check_device(name: str) -> None:
    try:
        is_real = torch.empty(0, device=name).device.type != "meta"
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise typer.BadParameter(f"device {name!r}: {reason}") from None
    if not is_real:
        raise typer.BadParameter(f"device {name!r} computes nothing: cpu or cuda is needed")


def dtype_of(name: str | None) -> torch.dtype | None:
    """That of its name.

    Raises:
        ValueError: it is another than the three that networks compute in.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES.get(name)
