"""Tile sizes and warps of each kernel, as data: tuning.json.

"default" serves every device; an architecture's own entry, "sm_90", overrides it kernel by kernel.
A configuration depends on the kernel alone, never on a length, so nothing is tuned at run time.
The values now there were chosen by what the compiled kernels take (registers, no spills, 16-byte
accesses) and wait to be measured.
"""

import functools
import json
from pathlib import Path

import torch

TABLE = json.loads(Path(__file__).with_name("tuning.json").read_text())


@functools.cache
def tuned(kernel: str, device: torch.device) -> tuple[int, int]:
    """(elements of a tile, num_warps) of a kernel such as "swiglu" or "ada_layer_norm.jvp"."""
    own = {}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        own = TABLE.get(f"sm_{major}{minor}", {})
    entry = own.get(kernel) or TABLE["default"][kernel]
    return entry["elements"], entry["num_warps"]
