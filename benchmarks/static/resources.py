"""Registers, spills, shared memory, occupancy, instructions and access widths of every kernel.

    python -m benchmarks resources [--arch 90] [--width 1152] [--dtype bfloat16] [--op swiglu]

Every op is called as TiM and other models call it, on meta tensors; each Triton kernel that it
would launch is compiled ahead of time, and so are all kernels of csrc/ where nvcc is found: no GPU
is needed.
"""

import argparse
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what users get; Triton 3.10 will not

import torch
import triton

from tim_kernels.launch.grid import REGISTERS

from ..cases import forms, fp8
from ..cases.calls import calls
from ..cases.shapes import Shape
from ..record.table import Column, text
from . import extension
from .cubin import ALL, Compiled, Resources, compile_launch, in_processes, specialise
from .launches import Launch, launches_on

HEAD_DIMS = {768: 64, 1152: 72}  # of the published models; 64 at any other width
SHARED = {80: 164, 90: 228, 100: 228}  # KiB of shared memory a multiprocessor
WARPS, BLOCKS = 64, 32  # of a multiprocessor
FEWER = {86: (48, 16), 89: (48, 24), 120: (48, 24)}  # warps and blocks of others


COLUMNS = (
    Column("kernel"), Column("call"), Column("arch", form="{}"), Column("width", form="{}"),
    Column("dtype"), Column("warps", "num_warps", "{}"),
    Column("regs", "resources.registers", "{}"), Column("spills", "resources.spills", "{}"),
    Column("shared", "resources.shared", "{}"),
    Column("held", lambda of: occupancy(of.resources, of.num_warps, of.arch), "{}"),
    Column("instr", "resources.instructions", "{}"),
    Column("ld 16 B", lambda of: _wide(of.resources.wide_loads, of.resources.narrow_loads), "{}"),
    Column("st 16 B", lambda of: _wide(of.resources.wide_stores, of.resources.narrow_stores), "{}"),
    Column("", lambda of: refusal(of.resources, of.arch, of.num_warps)),
)  # fmt: skip


def _wide(wide: int, narrow: int) -> str:
    return f"{wide}/{wide + narrow}"


def occupancy(resources: Resources, num_warps: int, arch: int) -> int:
    """Estimate of the warps that a multiprocessor holds, in programs of num_warps."""
    most_warps, most_blocks = FEWER.get(arch, (WARPS, BLOCKS))
    by_registers = REGISTERS // 4 // _of_a_warp(resources) * 4  # each quarter has its own registers
    by_shared = SHARED.get(arch, 100) * 1024 // (resources.shared + 1024)  # 1 KiB is CUDA's
    blocks = min(most_warps // num_warps, by_registers // num_warps, by_shared, most_blocks)
    return blocks * num_warps


def _of_a_warp(resources: Resources) -> int:
    """Its registers; a thread has them by eight."""
    return -(-resources.registers // 8) * 8 * 32


def refusal(resources: Resources, arch: int, num_warps: int) -> str | None:
    """Why a GPU cannot run it; None if it can. sm_86, sm_89 and sm_120 have 100 KiB."""
    most = (SHARED.get(arch, 100) - 1) * 1024
    if resources.is_trap:
        return "the compiler left a trap of it: it asks for more than there is"
    if resources.shared > most:
        return f"it needs {resources.shared} bytes of shared memory, a program has {most}"
    registers = -(-num_warps // 4) * 4 * _of_a_warp(resources)
    if registers > REGISTERS:
        return f"it needs {registers} registers, a program has {REGISTERS}"
    return None


Job = tuple[int, int, str, str, Launch]  # architecture, width, dtype, name of a call, its launch


def triton_jobs(
    architectures: Iterable[int], widths: Iterable[int], dtypes: Iterable[str],
    ops: Iterable[str], only_tim: bool = False,
) -> list[Job]:  # fmt: skip
    """Each kernel that a call of some op launches, once, at the first width that needs it."""
    jobs: dict[str, Job] = {}
    for arch, width, dtype in itertools.product(architectures, widths, dtypes):
        shape = Shape(256, (16, 16), (4, 32, 32), width, HEAD_DIMS.get(width, 64))
        of_dtype = getattr(torch, dtype)
        made = [calls(**shape._asdict(), dtype=of_dtype)]
        made += [] if only_tim else [forms.calls(shape, of_dtype, "meta")]
        made += [] if only_tim or arch < fp8.OLDEST else [fp8.calls(shape, of_dtype, "meta")]
        todo = ((call, way) for call in itertools.chain(*made) for way in call.directions)
        for call, direction in todo:
            for launch in (
                launches_on(arch, partial(call.run, direction)) if not ops or call.op in ops else ()
            ):
                code = repr((arch, launch.name, specialise(launch), launch.options))
                jobs.setdefault(code, (arch, width, dtype, call.name, launch))
    return list(jobs.values())


def compile_job(arch: int, width: int, dtype: str, call: str, launch: Launch) -> Compiled:
    constants = {
        parameter.name: str(launch.arguments[parameter.name])
        for parameter in launch.kernel.params
        if parameter.is_constexpr
    }
    return Compiled(
        backend="triton", kernel=launch.name, call=call, arch=arch, width=width, dtype=dtype,
        num_warps=launch.options.get("num_warps", 4), constants=constants,
        resources=compile_launch(launch, arch),
    )  # fmt: skip


def cuda_kernels(
    architectures: Iterable[int], dtypes: Iterable[str], ops: Iterable[str], processes: int
) -> list[Compiled]:
    """Every kernel of csrc/ that has one of the dtypes among its template arguments."""
    wanted = {extension.TYPES[name] for name in dtypes}
    found = extension.kernels(architectures, ops, processes)
    return [kernel for kernel in found if wanted & set(re.findall(r"\w+", kernel.call))]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=ALL)
    parser.add_argument("--width", type=int, nargs="+", default=[768, 1152])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--op", nargs="+", default=[], help="ada_layer_norm, …; all by default")
    parser.add_argument("--only-tim", action="store_true", help="not what other models call")
    parser.add_argument("--backend", nargs="+", default=["triton", "cuda"], help="both by default")
    parser.add_argument("--json", type=Path, help="where to write them too")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    kernels = []
    print("per kernel: warps a program, and those a multiprocessor holds, of 64 (86, 89, 120: 48)")
    if "triton" in args.backend:
        jobs = triton_jobs(args.arch, args.width, args.dtype, args.op, args.only_tim)
        kernels += in_processes(compile_job, jobs, args.processes)
        print(f"Triton {triton.__version__}\n{text(kernels, COLUMNS)}")
    if "cuda" in args.backend and (reason := extension.why_not()):
        print(f"CUDA: not compiled, {reason}")
    elif "cuda" in args.backend:
        cuda = cuda_kernels(args.arch, args.dtype, args.op, args.processes)
        print("CUDA; `call` is template arguments, dynamic shared memory not counted")
        print(text(cuda, COLUMNS))
        kernels += cuda
    if args.json:
        found = {"triton": triton.__version__, "kernels": [asdict(each) for each in kernels]}
        args.json.write_text(json.dumps(found, indent=1))
