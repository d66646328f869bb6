"""What benchmarks/static/blocks.py says of launches of csrc/ is what its launchers do."""

import json
from pathlib import Path

import pytest
from emulated import compile_op, run_python

# Blocks, threads, bytes of shared memory, and the types that the kernel takes: of the same call
# emulated, and of what limits.py would read. One sample is enough of a call in bfloat16.
CODE = """
import json, sys
import torch
from benchmarks.cases.calls import calls
from benchmarks.static.blocks import launched
from benchmarks.static.launches import record_cuda, record_launches, through_launchers
from tim_kernels import use_backend
from tim_kernels.dispatch import extension

name, direction, op, width, head_dim = sys.argv[1:6]
call = next(
    each for each in calls(int(width), int(head_dim), batch=1, grid=(2, 4), device="cpu")
    if each.name == name
)
operator = f"{op}_{direction}"
with use_backend("triton"), record_launches(), record_cuda() as found, through_launchers("cuda"):
    call.run(direction)
launch = launched(operator, dict(found)[operator])
extension.emulate(sys.argv[6])
with use_backend("cuda"):
    call.run(direction)
print(json.dumps([launch.kernel, launch.blocks, 32 * launch.warps, launch.shared]))
"""
ADA, QK = "gated_residual_ada_layer_norm", "qk_norm_rope of packed qkv"
CASES = [
    *((ADA, "ada_layer_norm", width, 64) for width in (768, 1152)),
    *((QK, "qk_norm_rope", width, of) for width, of in ((768, 64), (1152, 72), (2048, 128))),
    (QK, "qk_norm_rope", 1920, 96),
]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("emulation")
    return {op: compile_op(op, folder) for op in ("ada_layer_norm", "qk_norm_rope")}


@pytest.mark.nightly
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("name", "op", "width", "head_dim"), CASES)
def test_a_launch(name, op, width, head_dim, direction, libraries, tmp_path):
    notes = tmp_path / "launches"
    arguments = [name, direction, op, str(width), str(head_dim), str(libraries[op])]
    run = run_python(CODE, *arguments, TIM_KERNELS_EMULATED_LAUNCHES=str(notes))
    assert run.returncode == 0, run.stderr[-3000:]
    kernel, *launch = json.loads(run.stdout.splitlines()[-1])
    taken = [line.split(maxsplit=3) for line in notes.read_text().splitlines()]
    *counts, types = next(each for each in taken if direction.capitalize() in each[-1])
    assert ("Staged" in types) == kernel.endswith("_staged")
    if head_dim == 96:  # what the general kernels of heads share is not said
        counts, launch = counts[:2], launch[:2]
    assert [int(count) for count in counts] == launch
