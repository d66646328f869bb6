"""torch.compile of the whole model: one graph, no recompilation for another batch or size."""

import pytest
import torch
import torch._dynamo.testing
from eager import EagerTiM, randomise
from golden_files import relative_error
from parity import BACKEND, DEVICE

from tim_kernels import use_backend

pytest.importorskip("diffusers", reason="tim.models needs diffusers")
from tim.models import TiMTransformer2DModel  # noqa: E402

TINY = dict(
    patch_size=2, in_channels=3, hidden_size=24, encoder_depth=1, depth=2, num_heads=2,
    num_classes=5, z_dim=6, projector_dim=10, lora_hidden_size=8,
)  # fmt: skip


def problem(text: bool, **changes):
    config = TINY | dict(cap_feat_dim=7 if text else None) | changes
    model = TiMTransformer2DModel(**config)
    model.load_state_dict(randomise(EagerTiM(**config)).state_dict())
    return model.to(DEVICE)


def inputs(text: bool, batch: int, height: int, width: int):
    g = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, height, width, generator=g)
    t = torch.rand(batch, generator=g) * 0.5 + 0.5
    y = torch.randn(batch, 11 + batch, 7, generator=g) if text else torch.arange(batch) % 5
    return tuple(tensor.to(DEVICE) for tensor in (x, t, t / 2, y))


@pytest.mark.parametrize(
    "text, backend, compiler",
    [
        *(
            pytest.param(
                text, "reference", "inductor", id=f"{name}-inductor", marks=pytest.mark.nightly
            )
            for name, text in (("class", False), ("text", True))
        ),
        pytest.param(False, "reference", "aot_eager", id="class-reference-aot_eager"),
        pytest.param(False, BACKEND, "aot_eager", id=f"class-{BACKEND}-aot_eager"),
        pytest.param(True, BACKEND, "aot_eager", id=f"text-{BACKEND}-aot_eager"),
    ],
)
def test_one_graph_for_every_size(text, backend, compiler):
    # inductor takes a minute for each block
    model = problem(text, **(dict(depth=1) if compiler == "inductor" else {}))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for batch, height, width in ((2, 4, 6), (3, 8, 4), (4, 6, 10)):
        args = inputs(text, batch, height, width)
        with use_backend("reference"):
            expected = model(*args)
        with use_backend(backend):
            sample = compiled(*args)
            sample.square().sum().backward()
        assert relative_error(sample, expected) < 2e-5
        compilations.append(counter.frame_count)
    assert compilations[0] > 0 and len(set(compilations)) == 1, compilations
    assert all(p.grad is not None for n, p in model.named_parameters() if "projector" not in n)
