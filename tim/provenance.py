"""What a number or a picture came from: versions and hashes, for whoever repeats it."""

import hashlib
import importlib.metadata
import json
import platform
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "tim-kernels", "torch", "triton", "diffusers", "transformers", "numpy", "pillow", "scipy",
    "torch-fidelity", "torchmetrics",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of Python, of the packages that are installed, and of the device: {name: version}."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # with the build, such as +cpu
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    else:
        found["device"] = f"CPU, {platform.machine()}"
    return found


def file_hash(*paths: Path) -> str:
    """SHA-256 of the files' contents one after another, hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        for block in _blocks(path):
            digest.update(block)
    return digest.hexdigest()


def value_hash(value: Any) -> str:
    """SHA-256 of what JSON can hold, as JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def state_hash(module: torch.nn.Module) -> str:
    """SHA-256 of all weights and buffers with their names, dtypes and shapes, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_hash(network: torch.nn.Module) -> str:
    """CRC-32 of all weights and buffers, hexadecimal."""
    value = 0
    for tensor in network.state_dict().values():
        value = zlib.crc32(tensor.cpu().reshape(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def _blocks(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block
