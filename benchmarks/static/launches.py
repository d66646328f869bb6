"""Which Triton kernels a piece of code would launch, on meta tensors or any other; no GPU needed.

`record_launches` notes them; `through_launchers` makes the public functions launch on meta tensors.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, KernelInterface

from tim_kernels import use_backend
from tim_kernels.dispatch import backend, extension
from tim_kernels.dispatch.operators import OPERATORS
from tim_kernels.launch import tuning


@dataclass
class Launch:
    """One kernel launch: the kernel, its bound arguments and its options (num_warps, …)."""

    kernel: KernelInterface
    arguments: dict
    options: dict
    grid: tuple

    @property
    def name(self) -> str:
        """swiglu.forward of _swiglu_forward_kernel in tim_kernels/swiglu/triton.py."""
        function = self.kernel.fn
        folder = function.__module__.split(".")[-2]
        return f"{folder}.{without_folder(function.__name__, folder)}"

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


def without_folder(kernel: str, folder: str) -> str:
    """forward of _swiglu_forward_kernel, or of _forward_kernel."""
    return kernel.strip("_").removesuffix("_kernel").removeprefix(f"{folder}_")


@contextlib.contextmanager
def record_launches(note: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Collect Triton launches, or `note` each, instead of running them; also interpreted ones."""
    launches: list[Launch] = []
    note = note or launches.append

    def record(self, *args, grid, warmup, **kwargs):
        names = list(inspect.signature(self.fn).parameters)
        arguments = dict(zip(names, args, strict=False))
        arguments |= {k: v for k, v in kwargs.items() if k in names}
        options = {k: v for k, v in kwargs.items() if k not in names}
        note(Launch(self, arguments, options, grid))

    with patch.object(JITFunction, "run", record), patch.object(InterpretedFunction, "run", record):
        yield launches


def launches_on(arch: int, run: Callable[[], object]) -> list[Launch]:
    """What `run` launches on that architecture, with tensors on "meta"."""
    with (
        use_backend("triton"), tuning.as_architecture(arch),
        record_launches() as launches, through_launchers(),
    ):  # fmt: skip
        run()
    return launches


@contextlib.contextmanager
def record_cuda() -> Iterator[list[tuple[str, tuple]]]:
    """Collect calls of the operators of csrc/, (name, arguments) each, instead of making them."""
    calls: list[tuple[str, tuple]] = []

    class Operators:
        def __getattr__(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(default=lambda *args: calls.append((name, args)))

    with patch.object(extension, "ops", Operators):
        yield calls


def launch_operator(op: torch._ops.OpOverload, *args, of: str = "triton"):
    """Run the launcher of an operator `tim_kernels::…` on whatever tensors it is given.

    A fake kernel only makes the outputs; this makes scratch memory and launches as on a GPU.
    """

    operator = OPERATORS[op.name().partition("::")[2].partition(".")[0]]
    return backend.plan(operator.op, operator.launcher, args, of)(*args)


class through_launchers(TorchDispatchMode):
    """Inside it the operators take their launchers, on meta tensors too: Triton's, or those "cuda"
    has, of csrc/."""

    def __init__(self, of: str = "triton"):
        super().__init__()
        self.of = of

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "tim_kernels":
            return launch_operator(op, *args, of=self.of)
        return op(*args, **(kwargs or {}))
