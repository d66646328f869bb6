"""The compiled extension, `tim_kernels/_cuda.so`: loaded when somebody first asks, and why not.

setup.py leaves beside it `_cuda.json`, which says for which architectures it was built, or why it
was not. The library's operators fill tensors that the launchers in <op>/cuda.py make;
csrc/registration.cpp lists them.
"""

import ctypes
import functools
import json
from pathlib import Path

import torch

from ..launch.plans import forget

LIBRARY = Path(__file__).parents[1].joinpath("_cuda.so")
BUILD = Path(__file__).parents[1].joinpath("_cuda.json")
NAMESPACE = "tim_kernels_cuda"  # of the library's operators, unless its build says otherwise

_emulated = False


def emulate(library: Path) -> None:
    """Load a build of csrc/ for the CPU instead, as the tests do."""
    global _emulated
    torch.ops.load_library(library)
    _emulated = True
    forget()


def why_not(device: str) -> str | None:
    """Why the extension cannot run on tensors of a device type; None if it can."""
    if _emulated:
        return None if device == "cpu" else f"it is emulated on the CPU, not on {device}"
    if reason := _not_loadable():
        return reason
    if device != "cuda":
        return f"it needs a CUDA device, not {device}"
    if not torch.cuda.is_available():
        return "there is no GPU"
    capability = torch.cuda.get_device_capability()
    return _not_built_for(capability) or _not_driven(_driver()) or _not_loaded()


@functools.cache
def build() -> dict:
    """What setup.py noted: {"architectures": ["80", …, "100+PTX"], "nvcc": "13.0", "sources": a
    hash of csrc/}, or {"reason": why there is no extension}."""
    if not BUILD.exists():
        return {"reason": "it was not built (python setup.py build_ext --inplace builds it)"}
    return json.loads(BUILD.read_text())


@functools.cache
def _not_loadable() -> str | None:
    if reason := build().get("reason"):
        return reason
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is missing beside {BUILD.name}: build it again"
    if torch.version.cuda is None:
        return f"this torch, {torch.__version__}, was built without CUDA"
    return None


def _not_built_for(capability: tuple[int, int]) -> str | None:
    """A build runs on its own architectures, on later minor versions of them, and with PTX on
    every later one."""
    major, minor = capability
    device = 10 * major + minor
    for name in build()["architectures"]:
        number, _, ptx = name.partition("+")
        built = int(number)
        if built <= device and (ptx or built // 10 == major):
            return None
    built = ", ".join(f"sm_{name}" for name in build()["architectures"])
    return f"it was built for {built}, and this GPU is sm_{device}"


def _not_driven(driver: int | None) -> str | None:
    """The library holds the runtime of the CUDA that built it, which needs a driver of as high a
    major version; `driver` is the CUDA version that it supports, 13000 for 13.0."""
    built = build()["nvcc"]
    if driver is None or driver // 1000 >= int(built.partition(".")[0]):
        return None
    supported = f"{driver // 1000}.{driver % 1000 // 10}"
    return f"it was built with CUDA {built}, and the driver supports {supported}"


@functools.cache
def _driver() -> int | None:
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:  # no driver to ask
        return None
    return version.value


@functools.cache
def _not_loaded() -> str | None:
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"it does not load: {error}"
    return None


def ops():
    """The library's operators; another build has another namespace, so that two can be loaded."""
    return getattr(torch.ops, NAMESPACE if _emulated else build().get("namespace", NAMESPACE))
