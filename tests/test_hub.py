"""A build for Hugging Face's kernel hub, loaded by `kernels` beside the installed package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import setup as build_script

ROOT = Path(__file__).parents[1]
BESIDE = """
import copy
import sys
from pathlib import Path

import kernels
import torch
from eager import EagerTiM, randomise

import tim_kernels

hub = kernels.get_local_kernel(Path(sys.argv[1]))
assert hub is not tim_kernels and hub.__all__ == tim_kernels.__all__
assert Path(hub.__file__).is_relative_to(sys.argv[1])
names = {name for name in sys.modules if name.split(".")[0] == hub.__name__}
assert len(names) > 40 and f"{hub.__name__}.dispatch.operators" in names

x, row = torch.randn(2, 5, 72), torch.randn(2, 72)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def results(ops, backend):
    args = [t.to(DEVICE).requires_grad_() for t in (x, row)]
    with ops.use_backend(backend):
        out = ops.ada_layer_norm(*args, args[1]) + ops.swiglu(args[0], args[0])
        q = args[0].unflatten(-1, (2, 36))
        out = out + ops.attention(q, q, q).flatten(2)
        derivative = lambda x: ops.ada_layer_norm(x, row.to(DEVICE), row.to(DEVICE))
        tangent = torch.func.jvp(derivative, (args[0],), (args[0].cos(),))[1]
        return out, tangent, *torch.autograd.grad(out.square().sum(), args)


def network(ops, backend):
    model = randomise(EagerTiM(
        patch_size=2, in_channels=3, hidden_size=48, encoder_depth=1, depth=2, num_heads=2,
        num_classes=5, z_dim=6, projector_dim=10, lora_hidden_size=8,
    )).to(DEVICE)
    g = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 4, 6, generator=g).to(DEVICE)
    times = (torch.tensor(times, device=DEVICE) for times in ([0.9, 0.6], [0.2, 0.6]))
    with ops.use_backend(backend):
        report = ops.accelerate(model)
        assert report.fused == [""] and type(report).__module__.startswith(ops.__name__), report
        return [model(image, *times, torch.tensor([1, 5], device=DEVICE))]


for of in (results, network):
    for backend in sys.argv[2:]:
        pairs = zip(of(tim_kernels, backend), of(hub, backend), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), (of, backend)

for ops in (hub, tim_kernels):
    assert hasattr(getattr(torch.ops, ops.__name__), "ada_layer_norm_backward")
try:
    with hub.use_backend("triton"):
        torch.func.jvp(getattr(torch.ops, hub.__name__).swiglu, (x, x), (x, x))
except NotImplementedError as error:
    assert str(error).startswith(f"{hub.__name__}::swiglu has no forward derivative"), error
hub.set_backend("reference")
assert f"backend {'reference'!r}" in hub.explain() and "backend 'auto'" in tim_kernels.explain()
segments = tim_kernels.Segments.from_lengths([2, 3], DEVICE)
try:
    hub.ada_layer_norm(x[0], row, row, segments=segments)
except ValueError as error:
    assert hub.__name__ in str(error) and "got a <class 'tim_kernels.segments" in str(error), error
print("both", hub.__name__, [k.metadata.id for k in kernels.get_loaded_kernels()])
"""


def lay_out(folder: Path, archs: str) -> list[Path]:
    """The variants that `make hub` makes, with an extension for `archs`."""
    command = [sys.executable, "setup.py", "--quiet", "hub", "--out", str(folder)]
    environment = os.environ | {"TIM_KERNELS_CUDA_ARCHS": archs}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return sorted(folder.glob("build/*"))


def load_beside(folder: Path, *backends: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    environment |= {"HF_HUB_OFFLINE": "1", "TIM_KERNELS_BACKEND": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", BESIDE, str(folder), *backends],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_the_universal_variant_beside_the_installed_package(tmp_path):
    (variant,) = lay_out(tmp_path, "none")
    assert variant.name == "torch-universal"
    assert not list(variant.rglob("*.so")) and not list(variant.rglob("__pycache__"))
    name = json.loads((variant / "metadata.json").read_text())["id"]
    assert load_beside(tmp_path, "reference", "triton", "auto") == f"both {name} {[name]!r}"


@pytest.mark.skipif(
    build_script.why_not_built() is not None, reason=f"{build_script.why_not_built()}"
)
def test_the_variant_with_the_extension(tmp_path):
    """It is what a CUDA build of torch gets; its library has a namespace of its own."""
    cuda, universal = lay_out(tmp_path, "90")
    assert cuda.name.startswith("torch-stable-abi211-cu") and universal.name == "torch-universal"
    metadata = json.loads((cuda / "metadata.json").read_text())
    assert metadata["backend"] == {"type": "cuda", "archs": ["9.0"]}
    assert f"'{metadata['id']}'" in load_beside(tmp_path, "reference", "triton")
    namespace = json.loads((cuda / "_cuda.json").read_text())["namespace"]
    assert namespace.removeprefix("tim_kernels_cuda_") == metadata["id"].rpartition("_")[2]
    torch.ops.load_library(cuda / "_cuda.so")
    assert hasattr(getattr(torch.ops, namespace), "swiglu_forward")


def test_a_build_s_name_is_of_its_sources(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("1")
    two.write_text("2")
    names = {build_script.digest(files) for files in ([one], [two], [two, one])}
    assert len(names) == 3 and build_script.digest([one, two]) in names
