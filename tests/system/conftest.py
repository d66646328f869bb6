"""`case`: ours or an accelerated model beside plain modules, see `people`; `captures` of graphs."""

import pytest
import torch
from people import Case

from tim.sampling import graphs
from tim_kernels import use_backend
from tim_kernels.dispatch.backend import interpreting

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.nightly)]


@pytest.fixture(params=["ours", "accelerated"])
def kind(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["class", "text"])
def text(request):
    return request.param


@pytest.fixture(params=BACKENDS)
def case(request, kind, text):
    if request.param == "triton" and not (interpreting() or torch.cuda.is_available()):
        pytest.fail("Triton cannot run here: set TRITON_INTERPRET=1")
    with use_backend(request.param):
        yield Case(kind, text)


@pytest.fixture
def captures(monkeypatch):
    """How many steps were captured; a step is captured on a CPU, too."""
    captured = []

    def capture(function, device):
        out = function()
        captured.append(function)
        return lambda: out.copy_(function()), out

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "obstacle", lambda device: None)
    return captured
