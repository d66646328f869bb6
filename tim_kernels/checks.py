"""What the public functions refuse, each in one line that says what came and what is needed."""

import torch
from torch import Tensor

FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64  # the last without kernels


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype every op computes in: float32, or float64 where an input has it."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def is_double(*tensors: Tensor | None) -> bool:
    """Whether any is float64, for which no kernel is made."""
    return any(x is not None and x.dtype == torch.float64 for x in tensors)


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be floating-point, float32, bfloat16, float16 or float64; "
            f"got {tensor.dtype}"
        )


def check_same_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like the tokens, got {tensor.device}")
    check_floating(name, tensor)


def check_tokens(name: str, x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Refuse what is no token tensor, (B, N, …) or packed (T, …); returns how many samples."""
    if cu_seqlens is None:
        if x.ndim < 3:
            raise ValueError(
                f"{name} must be (B, N, …), got {tuple(x.shape)}; packed tokens (T, …) "
                "need `segments`"
            )
        return x.shape[0]
    if cu_seqlens.device != x.device:
        raise ValueError(
            f"segments.cu_seqlens must be on {x.device} like {name}, got {cu_seqlens.device}"
        )
    return cu_seqlens.shape[0] - 1


def is_rows(count: int, samples: int) -> bool:
    """Whether so many rows are one a sample, or one for all. Not by `in`: dynamo compares symbolic
    sizes there by what they are, not by their value."""
    return count == 1 or count == samples


def check_cond(name: str, row: Tensor, samples: int, width: int, x: Tensor) -> None:
    """Refuse a conditioning row that is not (samples, width) or (1, width)."""
    if row.ndim != 2 or not is_rows(row.shape[0], samples) or row.shape[1] != width:
        raise ValueError(
            f"{name} must be ({samples}, {width}) or (1, {width}), got {tuple(row.shape)}"
        )
    check_same_device(name, row, x)


def check_modulation(name: str, cond: Tensor, samples: int, x: Tensor, is_packed: bool) -> None:
    """Refuse what is neither a conditioning row nor conditioning of each token of x."""
    width = x.shape[-1]
    of_token = (1, *x.shape) if is_packed else tuple(x.shape)
    if cond.ndim == 3 and tuple(cond.shape) == of_token:
        return check_same_device(name, cond, x)
    if cond.ndim == 2 and is_rows(cond.shape[0], samples) and cond.shape[1] == width:
        return check_same_device(name, cond, x)
    raise ValueError(
        f"{name} must be ({samples}, {width}) or (1, {width}), or {tuple(x.shape)} of each token; "
        f"got {tuple(cond.shape)}"
    )


def check_channels(name: str, vector: Tensor, width: int, x: Tensor) -> None:
    """Refuse a weight or bias that is not (width,)."""
    check_same_device(name, vector, x)
    if vector.shape != (width,):
        raise ValueError(f"{name} must be ({width},), got {tuple(vector.shape)}")


def check_latents(name: str, x: Tensor) -> None:
    """Refuse what is no tensor of samples, (B, …)."""
    check_same_device(name, x, x)
    if x.ndim < 2:
        raise ValueError(f"{name} must be (B, …) with two dimensions or more, got {tuple(x.shape)}")


def check_like(name: str, tensor: Tensor, samples: int, x_name: str, x: Tensor) -> None:
    """Refuse what is not `samples` latents of the shape of x's, on its device."""
    shape = (samples, *x.shape[1:])
    if tensor.ndim != x.ndim or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be {shape} for {x_name} of {tuple(x.shape)}; got {tuple(tensor.shape)}"
        )
    check_same_device(name, tensor, x)


def check_vector(name: str, vector: Tensor, samples: int, x: Tensor) -> None:
    """Refuse a coefficient that is not one number for each of `samples` samples, (samples,)."""
    if vector.ndim != 1 or vector.shape[0] != samples:
        raise ValueError(
            f"{name} must be ({samples},), one number a sample; got {tuple(vector.shape)}"
        )
    check_same_device(name, vector, x)
