"""Fused ops run on the GPU where there is one; else in Triton's interpreter, or, with
TIM_KERNELS_EMULATION, in a build of csrc/ for the CPU (see tests/csrc)."""

import os

import numpy as np
import pytest
import torch
import variants

from tim_kernels import extension


def round_bfloat16_like_hardware() -> None:
    """Triton's interpreter truncates float32 to bfloat16; a GPU rounds to nearest even."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = rounded


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic GEMMs on a GPU
torch.backends.cudnn.allow_tf32 = False  # float32 is float32 in a convolution too
if not torch.cuda.is_available():
    round_bfloat16_like_hardware()
if emulation := os.environ.get("TIM_KERNELS_EMULATION"):
    extension.emulate(emulation)
elif not torch.cuda.is_available():
    variants.watch()


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Whatever a kernel forgets to write is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
