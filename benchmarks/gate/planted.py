"""A kernel that writes past its allocation: a sanitizer that is silent about it sees nothing."""

import torch
import triton
import triton.language as tl


@triton.jit
def _past_the_end_kernel(x_ptr, offset, BLOCK: tl.constexpr):
    tl.store(x_ptr + offset + tl.arange(0, BLOCK), 1.0)


def write_past_the_end() -> None:
    """Needs PYTORCH_NO_CUDA_MEMORY_CACHING=1: the caching allocator's blocks are larger."""
    x = torch.zeros(128, device="cuda")
    _past_the_end_kernel[(1,)](x, 1024, BLOCK=128)
    torch.cuda.synchronize()
