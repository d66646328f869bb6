"""An engine's graphs on a GPU: replays give the bits of the steps themselves."""

import pytest
import torch
from parity import BACKEND, DEVICE

from tim_kernels import use_backend

pytest.importorskip("diffusers", reason="tim.sampling needs diffusers")

from tests.system.small_engines import KINDS, given, tiny  # noqa: E402
from tim.sampling import Engine  # noqa: E402
from tim.transports import make  # noqa: E402

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampler_replays_its_steps(kind):
    """With the bits that they have without a graph, on every run's own conditions and noise."""
    model = tiny(kind).to(DEVICE).bfloat16()
    engine, eager = (Engine(model, make("OT_FM"), graphs=graphs) for graphs in (True, False))
    for run in range(4):
        args = [x.to(DEVICE) for x in given(kind, seed=run)]
        options = dict(num_steps=4, cfg_scale=1.5 + run, stochasticity_ratio=0.5)
        with use_backend(BACKEND):
            out, expected = (
                sampler.sample(*args, generator=torch.Generator().manual_seed(run), **options)
                for sampler in (engine, eager)
            )
        assert torch.equal(out, expected)
    assert "no replay" not in engine.explain()
