"""Registers, spills, shared memory, occupancy, instructions and access widths of every kernel.

    python -m benchmarks.resources [--arch 90] [--width 1152] [--dtype bfloat16] [--op swiglu]

Every op is called as the models call it, on meta tensors; each Triton kernel that it would launch
is compiled ahead of time, and so are all kernels of csrc/ where nvcc is found: no GPU is needed.
"""

import argparse
import itertools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what users get; Triton 3.10 will not

import torch
import triton

from tim_kernels import use_backend
from tim_kernels.launch import tuning

from . import extension
from .calls import DIRECTIONS, calls
from .cubin import (
    ARCHITECTURES,
    Launch,
    Resources,
    compile_launch,
    in_processes,
    record_launches,
    specialise,
    through_launchers,
)

HEAD_DIMS = {768: 64, 1152: 72}  # of the published models; 64 at any other width
SHARED = {80: 164, 90: 228, 100: 228}  # KiB of shared memory a multiprocessor
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor


@dataclass
class Row:
    """One kernel as one call of an op launches it, compiled for one architecture.

    Of a CUDA kernel, `call` is its template arguments and num_warps the most that it is launched
    with; width and constants are empty, and dynamic shared memory is not in `shared`.
    """

    backend: str
    kernel: str
    call: str
    arch: int
    width: int
    dtype: str
    num_warps: int
    constants: dict
    resources: Resources

    @property
    def warps(self) -> int:
        """Estimate of the warps that a multiprocessor holds, 64 at most."""
        per_warp = -(-self.resources.registers // 8) * 8 * 32
        by_registers = REGISTERS // 4 // per_warp * 4  # each quarter has its own registers
        by_shared = SHARED[self.arch] * 1024 // (self.resources.shared + 1024)  # 1 KiB is CUDA's
        blocks = min(WARPS // self.num_warps, by_registers // self.num_warps, by_shared, BLOCKS)
        return blocks * self.num_warps


Job = tuple[int, int, str, str, Launch]  # architecture, width, dtype, name of a call, its launch


def triton_jobs(
    architectures: Iterable[int], widths: Iterable[int], dtypes: Iterable[str], ops: Iterable[str]
) -> list[Job]:
    """Each kernel that a call of some op launches, once, at the first width that needs it."""
    jobs: dict[str, Job] = {}
    for arch, width, dtype in itertools.product(architectures, widths, dtypes):
        for call in calls(width, HEAD_DIMS.get(width, 64), getattr(torch, dtype)):
            for direction in DIRECTIONS:
                with (
                    use_backend("triton"), tuning.as_architecture(arch),
                    record_launches() as launches, through_launchers(),
                ):  # fmt: skip
                    call.run(direction)
                for launch in launches:
                    if not ops or launch.name.partition(".")[0] in ops:
                        code = repr((arch, launch.name, specialise(launch), launch.options))
                        jobs.setdefault(code, (arch, width, dtype, call.name, launch))
    return list(jobs.values())


def compile_job(arch: int, width: int, dtype: str, call: str, launch: Launch) -> Row:
    constants = {
        parameter.name: str(launch.arguments[parameter.name])
        for parameter in launch.kernel.params
        if parameter.is_constexpr
    }
    warps, resources = launch.options.get("num_warps", 4), compile_launch(launch, arch)
    return Row("triton", launch.name, call, arch, width, dtype, warps, constants, resources)


def cuda_rows(
    architectures: Iterable[int], dtypes: Iterable[str], ops: Iterable[str], processes: int
) -> list[Row]:
    """Every kernel of csrc/ that has one of the dtypes among its template arguments."""
    wanted = {extension.TYPES[name] for name in dtypes}
    return [
        Row(
            "cuda", name, f"<{arguments}", kernel.arch, 0, "", kernel.threads // 32, {},
            kernel.resources,
        )
        for kernel in extension.kernels(architectures, ops, processes)
        for name, _, arguments in [kernel.name.partition("<")]
        if wanted & set(re.findall(r"\w+", arguments))
    ]  # fmt: skip


def table(rows: Iterable[Row]) -> str:
    lines = [
        f"{'kernel':<38}{'call':<32}{'arch':>5}{'width':>6} {'dtype':<9}{'warps':>6}{'regs':>5}"
        f"{'spills':>7}{'shared':>7}{'of 64':>6}{'instr':>7}{'ld 16 B':>10}{'st 16 B':>10}"
    ]
    for row in rows:
        r = row.resources
        loads = f"{r.wide_loads}/{r.wide_loads + r.narrow_loads}"
        stores = f"{r.wide_stores}/{r.wide_stores + r.narrow_stores}"
        lines.append(
            f"{row.kernel:<38}{row.call:<32}{row.arch:>5}{row.width or '':>6} {row.dtype:<9}"
            f"{row.num_warps:>6}{r.registers:>5}{r.spills:>7}{r.shared:>7}{row.warps:>6}"
            f"{r.instructions:>7}{loads:>10}{stores:>10}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=ARCHITECTURES)
    parser.add_argument("--width", type=int, nargs="+", default=[768, 1152])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--op", nargs="+", default=[], help="ada_layer_norm, …; all by default")
    parser.add_argument("--backend", nargs="+", default=["triton", "cuda"], help="both by default")
    parser.add_argument("--json", type=Path, help="where to write the rows too")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    rows = []
    print("per kernel: warps a program, warps of 64 a multiprocessor")
    if "triton" in args.backend:
        jobs = triton_jobs(args.arch, args.width, args.dtype, args.op)
        rows += in_processes(compile_job, jobs, args.processes)
        print(f"Triton {triton.__version__}\n{table(rows)}")
    if "cuda" in args.backend and (reason := extension.obstacle()):
        print(f"CUDA: not compiled, {reason}")
    elif "cuda" in args.backend:
        cuda = cuda_rows(args.arch, args.dtype, args.op, args.processes)
        print(
            f"CUDA; `call` is template arguments, dynamic shared memory not counted\n{table(cuda)}"
        )
        rows += cuda
    if args.json:
        entries = [asdict(row) | {"warps": row.warps} for row in rows]
        args.json.write_text(json.dumps({"triton": triton.__version__, "rows": entries}, indent=1))


if __name__ == "__main__":
    main()
