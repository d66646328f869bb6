"""Every op can be captured in a CUDA graph, and a replay computes what is then in its inputs."""

import pytest
import torch
from parity import BACKEND, DEVICE

from benchmarks.cases.calls import DIRECTIONS, calls
from benchmarks.cases.ops import thunk
from benchmarks.clock.timing import copies, side_stream
from tests.system.small_engines import KINDS, given, tiny
from tim.sampling import Engine
from tim.transports import make
from tim_kernels import qk_norm_rope, use_backend
from tim_kernels.qk_norm_rope import frequencies

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")

SHAPES = {
    "tokens": dict(batch=3, grid=(4, 5), latent=(4, 8, 10)),
    "packed": dict(batch=2, grid=(0, 0), latent=(4, 8, 10), grids=((4, 5), (3, 3))),
}
NAMES = [
    (shape, call.name)
    for shape, sizes in SHAPES.items()
    for call in calls(width=144, dtype=torch.bfloat16, **sizes)
]
DIRECTION = dict(zip(DIRECTIONS, ("forward", "forward + backward", "tangent"), strict=True))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape, name", NAMES)
def test_replay(shape, name, direction):
    every = calls(width=144, dtype=torch.bfloat16, device=DEVICE, **SHAPES[shape])
    call = next(call for call in every if call.name == name)
    captured, fresh = copies((*call.tensors, *call.constants), 3)[1:]
    split = len(call.tensors)

    def prepare(inputs):
        return thunk(
            DIRECTION[direction], call.function, lambda f: f, inputs[:split], inputs[split:],
            torch.bfloat16,
        )  # fmt: skip

    with use_backend(BACKEND), side_stream(DEVICE):
        run = prepare(captured)
        run()  # compiles, and tunes nothing
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            replayed = run()
        for old, new in zip(captured, fresh, strict=True):
            new.mul_(0.5) if new.is_floating_point() else None
            old.copy_(new)
        graph.replay()
        expected = prepare(fresh)()
        torch.cuda.synchronize()
    for a, b in zip(_flat(replayed), _flat(expected), strict=True):
        assert torch.equal(a, b)


def _flat(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def test_the_first_use_may_be_inside_a_compiled_graph():
    """What an op keeps for later must not lie in the pool of the graph that made it."""
    frequencies._tables.clear()
    q = torch.randn(2, 20, 2, 72, device=DEVICE)
    with use_backend(BACKEND):
        compiled = torch.compile(lambda q: qk_norm_rope(q, grid=(4, 5)), mode="reduce-overhead")
        for _ in range(3):
            out = compiled(q).clone()
        assert torch.equal(out, qk_norm_rope(q, grid=(4, 5)))


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
