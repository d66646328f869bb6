"""Fused ops run on the GPU where there is one; else in Triton's interpreter, or, with
TIM_KERNELS_EMULATION, in a build of csrc/ for the CPU (see tests/csrc)."""

import os

import interpreter
import pytest
import torch

from tim_kernels.dispatch import extension

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic GEMMs on a GPU
torch.backends.cudnn.allow_tf32 = False  # float32 is float32 in a convolution too
if not torch.cuda.is_available():
    interpreter.mend()
if emulation := os.environ.get("TIM_KERNELS_EMULATION"):
    extension.emulate(emulation)
elif not torch.cuda.is_available():
    import variants

    variants.watch()


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Whatever a kernel forgets to write is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
