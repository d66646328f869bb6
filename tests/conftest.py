"""Golden files as parameters, and Triton's interpreter where there is no GPU."""

import os

import pytest
import torch
from golden_files import GOLDEN, Golden

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton decorates the first kernel


def pytest_generate_tests(metafunc):
    """`golden_<kind>` parametrises a test over every golden file of that kind."""
    for kind in ("model", "transport", "loss", "sample"):
        if f"golden_{kind}" in metafunc.fixturenames:
            paths = sorted(GOLDEN.glob(f"{kind}_*.safetensors"))
            assert paths, f"no golden files for {kind} in {GOLDEN}"
            metafunc.parametrize(
                f"golden_{kind}", [Golden(p) for p in paths], ids=[p.stem for p in paths]
            )


@pytest.fixture
def one_thread():
    """PyTorch's sums are then the same in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
