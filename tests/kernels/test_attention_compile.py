"""What the compilers make of attention; Triton's, of its tangent, in a process without the
interpreter."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from tim_kernels.attention import choice, op

ROOT = Path(__file__).parents[2]
PRELUDE = """
import json
import torch
from benchmarks.static.cubin import ARCHITECTURES, compile_launch, specialise
from benchmarks.static.launches import record_launches, through_launchers
from tim_kernels.launch import tuning
from tim_kernels import Segments, attention, use_backend

def launch(head_dim, B=2, N=64, M=64, heads=4, dtype=torch.bfloat16, live=(1, 1, 1),
           group=1, **options):
    sizes = [(B, n, 3, heads, head_dim) for n in (N, M)]
    q, k = (torch.empty(size, dtype=dtype, device="meta") for size in sizes)
    primals = q[:, :, 0], k[:, :, 1, ::group], k[:, :, 2, ::group]
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


def test_what_the_resource_report_leaves_out():
    """It has 64 and 72 in bfloat16 (see tests/bench): no spills there nor here. Of a kernel that
    asks for more than there is ptxas leaves a trap."""
    found = run("""
bf16, options = torch.bfloat16, dict(is_causal=True, group=2)
cases = [(architecture, *of) for architecture in ARCHITECTURES
         for of in ((128, bf16, {}), (72, torch.float32, {}), (72, bf16, options))]
cases += [(90, 128, bf16, options), (90, 256, bf16, {}), (120, 72, torch.float32, {})]
for architecture, head_dim, dtype, options in cases:
    with tuning.as_architecture(architecture):
        resources = compile_launch(launch(head_dim, dtype=dtype, **options), architecture)
    assert not resources.spills, (architecture, head_dim, dtype, options, resources)
    assert not resources.is_trap and resources.wide_loads, (architecture, head_dim, dtype)
print(len(cases))
""")
    assert found == 12


def test_the_tiles_of_data_centres_fit_consumer_gpus():
    """sm_86 and sm_89 take the tiles of sm_80, sm_120 those of sm_100: they have 99 KiB of shared
    memory a program where sm_80 has 163, sm_90 and sm_100 227. (sm_86 compiles to what sm_89
    does.)"""
    shared = run("""
def shared(architecture, head_dim):
    with tuning.as_architecture(architecture):
        return compile_launch(launch(head_dim), architecture).shared
print(json.dumps([shared(a, head_dim) for a in (89, 120) for head_dim in (72, 128)]))
""")
    assert all(0 < each <= 99 * 1024 for each in shared)


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


@pytest.mark.parametrize("version", [None, 2, 4])
def test_half_precision_is_one_graph_on_a_gpu(monkeypatch, version):
    """There it asks for flash-attn, which the compiler must not look into."""

    def flash_attn_func(q, k, v):
        return q + k + v if version == 2 else (q + k + v, q.sum(-1))

    module = types.ModuleType("flash_of_the_test")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(choice, "chosen", lambda: module.__name__ if version else "native")
    monkeypatch.setattr(choice, "NEWEST", (module.__name__,))
    monkeypatch.setattr(op, "_is_flash_ready", lambda *_: True)
    torch._dynamo.reset()  # the answer is fixed when it traces
    q, k, v = torch.randn(3, 2, 5, 2, 16).bfloat16()
    compiled = torch.compile(lambda *qkv: op.attention(*qkv), fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), op.attention(q, k, v), rtol=1e-2, atol=1e-2)


def test_no_length_is_compiled_for():
    """One code for every batch, length, number of heads, and for packed tokens another."""
    codes = run("""
def code(*args, **kwargs):
    call = launch(*args, **kwargs)
    return repr((specialise(call), call.options))
shapes = [(1, 1, 1, 2), (2, 7, 16, 2), (3, 256, 256, 4), (2, 1024, 300, 16)]
print(json.dumps([[len({code(head_dim, *shape) for shape in shapes}) for head_dim in (64, 72)],
                  len({code(64), code(72), code(64, live=(1, 0, 0)), code(64, dtype=torch.half),
                       code(64, is_causal=True), code(64, group=2), code(64, scale=0.3)})]))
""")
    assert codes == [[1, 1], 6]  # not for a scale
