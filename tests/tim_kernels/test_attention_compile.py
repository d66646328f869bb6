"""What the compiler makes of the tangent of attention, in a process without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRELUDE = """
import json
import torch
from benchmarks.cubin import ARCHITECTURES, compile_launch, record_launches, specialise
from benchmarks.cubin import through_launchers
from tim_kernels import Segments, attention, tuning, use_backend

def launch(head_dim, B=2, N=64, M=64, heads=4, dtype=torch.bfloat16, live=(1, 1, 1), **options):
    sizes = [(B, n, 3, heads, head_dim) for n in (N, M)]
    q, k = (torch.empty(size, dtype=dtype, device="meta") for size in sizes)
    primals = q[:, :, 0], k[:, :, 1], k[:, :, 2]
    some = tuple(x for x, is_live in zip(primals, live) if is_live)

    def of_live(*duals):
        duals = iter(duals)
        pairs = zip(primals, live)
        return attention(*(next(duals) if is_live else x for x, is_live in pairs), **options)

    with use_backend("triton"), record_launches() as launches, through_launchers():
        torch.func.jvp(of_live, some, some)
    (only,) = launches
    return only
"""


def run(code: str):
    """What `code` prints last, as JSON."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # what users get; Triton 3.10 will not
    command = [sys.executable, "-c", PRELUDE + code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_spills(dtype):
    """float32 may spill a little at 72; elsewhere nothing does. (Fewer than some hundred
    instructions are what ptxas leaves of a kernel that asks for more than there is.)"""
    spills = run(f"""
rows = []
for architecture in ARCHITECTURES:
    for head_dim in (64, 72, 128, 256):
        with tuning.as_architecture(architecture):
            resources = compile_launch(launch(head_dim, dtype=torch.{dtype}), architecture)
        assert resources.instructions > 500 and resources.wide_loads > 0, (head_dim, resources)
        rows.append((architecture, head_dim, resources.spills))
print(json.dumps(rows))
""")
    allowed = {72: 256} if dtype == "float32" else {}
    assert [row for row in spills if row[2] > allowed.get(row[1], 0)] == []


def test_72_does_not_pay_for_128():
    """Products are most of the instructions: 80 lanes are 5/8 of 128."""
    cost = run("""
def cost(head_dim):
    call = launch(head_dim)
    assert call.arguments["A"] + call.arguments["B"] == {64: 64, 72: 80, 128: 128}[head_dim]
    tile = call.arguments["ROWS"] * call.arguments["COLUMNS"]
    return compile_launch(call, 90).instructions * call.options["num_warps"] / tile
print(json.dumps([cost(head_dim) for head_dim in (64, 72, 128)]))
""")
    assert cost[0] < cost[1] < 0.7 * cost[2]


def test_no_length_is_compiled_for():
    """One code for every batch, length, number of heads, and for packed tokens another."""
    codes = run("""
def code(*args, **kwargs):
    call = launch(*args, **kwargs)
    return repr((specialise(call), call.options))
shapes = [(1, 1, 1, 2), (2, 7, 16, 2), (3, 256, 256, 4), (2, 1024, 300, 16)]
print(json.dumps([[len({code(head_dim, *shape) for shape in shapes}) for head_dim in (64, 72)],
                  len({code(64), code(72), code(64, live=(1, 0, 0)), code(64, dtype=torch.half)})]))
""")
    assert codes == [[1, 1], 4]
