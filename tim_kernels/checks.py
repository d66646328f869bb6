import torch
from torch import Tensor

FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64  # the last without kernels


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype every op computes in: float32, or float64 where an input has it."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be floating-point, float32, bfloat16, float16 or float64; "
            f"got {tensor.dtype}"
        )
