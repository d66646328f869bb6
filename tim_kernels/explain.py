"""What would run on this machine, and why."""

import torch

from .attention.op import flash_attention
from .dispatch.backend import OPS, BackendUnavailable, choose, obstacle, requested


def explain() -> str:
    """Print, and return, what would run for each op on this machine, and why not the others."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [f"device {device}, backend {requested()!r}"]
    for name in sorted(OPS):
        try:
            chosen = choose(name, device)
        except BackendUnavailable as error:
            chosen = f"none ({error})"
        others = "; ".join(
            f"not {backend}: {reason}"
            for backend in ("cuda", "triton")
            if (reason := obstacle(backend, name, device))
        )
        label = "attention, its tangent" if name == "attention" else name
        lines.append(f"{label:<32}{chosen:<12}{others}")
    lines.append(f"{'attention without tangents':<32}{_attention(device)}")
    text = "\n".join(lines)
    print(text)
    return text


def _attention(device: str) -> str:
    if device != "cuda":
        return "PyTorch   not flash-attn: it needs a CUDA device"
    flash = flash_attention()
    if flash is None:
        return "PyTorch   not flash-attn: it is not installed"
    return f"{flash.__name__} for bfloat16 and float16, else PyTorch"
