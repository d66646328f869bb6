"""What a measurement was made on: the machine in words, its state, and the limits it reaches."""

import contextlib
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .timing import is_cuda, measure, side_stream, synchronise

COPY_BYTES, GEMM_SIZE = 2**30, 8192


def describe(device: str | torch.device = "cpu") -> dict:
    """The machine and its software, without names or paths: what one needs to repeat a run."""
    facts = {
        "cpu": _processor(), "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(), "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "triton": _triton(), "gpu": None,
    }  # fmt: skip
    if is_cuda(device):
        gpu = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_gib": round(gpu.total_memory / 2**30, 1), "l2_mib": gpu.L2_cache_size / 2**20,
            "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
        facts |= _driver()
    return facts


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _nvml(device: str | torch.device = "cuda"):
    """(pynvml, handle of the device), or None where there is no NVML to ask."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver library
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    handle = _asked(pynvml.nvmlDeviceGetHandleByUUID, f"GPU-{uuid}")
    if handle is None and pynvml.nvmlDeviceGetCount() == 1:
        handle = _asked(pynvml.nvmlDeviceGetHandleByIndex, 0)
    return None if handle is None else (pynvml, handle)


def _driver() -> dict:
    if (nvml := _nvml()) is None:
        return {"driver": None}
    pynvml, handle = nvml
    driver = pynvml.nvmlSystemGetDriverVersion()
    limit = _asked(pynvml.nvmlDeviceGetPowerManagementLimit, handle)
    return {"driver": driver, "power_limit_w": None if limit is None else limit / 1e3}


def state() -> dict:
    """Clocks (MHz), temperature (°C), power (W) and throttling now; {} without NVML."""
    if not torch.cuda.is_available() or (nvml := _nvml()) is None:
        return {}
    pynvml, handle = nvml
    power = _asked(pynvml.nvmlDeviceGetPowerUsage, handle)
    return {
        "sm_mhz": _asked(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "memory_mhz": _asked(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        "celsius": _asked(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        "watts": None if power is None else power / 1e3,
        "throttle_reasons": _asked(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle),
    }


def _asked(question, *args):
    """The answer, None where the device or the driver does not give it."""
    try:
        return question(*args)
    except Exception:
        return None


class Limits(NamedTuple):
    """What this device reaches: bytes per second of a large copy, read and written; bfloat16
    FLOP per second of a large GEMM."""

    bandwidth: float
    flops: float


def limits(device: str | torch.device, quick: bool = False) -> Limits:
    """Measured now, on noise."""
    size, n = (2**24, 256) if quick else (COPY_BYTES, GEMM_SIZE)
    with side_stream(device):
        source = torch.randint(-128, 128, (2, size), dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        a, b = torch.randn(2, n, n, device=device).bfloat16()
        copy = measure([lambda i=i: target[i].copy_(source[i]) for i in range(2)], device, 0.3)
        gemm = measure([lambda: a @ b, lambda: b @ a], device, 0.5)
    return Limits(2 * size / copy.ms * 1e3, 2 * n**3 / gemm.ms * 1e3)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32, neither in GEMMs nor in the patch convolution."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def joules(run: Callable, runs: int, device: str | torch.device) -> float | None:
    """Of the whole device for one of some runs, by its own counter; None where there is none."""
    nvml = _nvml(device) if is_cuda(device) else None
    if nvml is None:
        return None

    def millijoules() -> int | None:
        synchronise(device)
        return _asked(nvml[0].nvmlDeviceGetTotalEnergyConsumption, nvml[1])

    before = millijoules()
    for _ in range(runs):
        run()
    after = millijoules()
    return (after - before) / 1e3 / runs if before is not None and after else None
