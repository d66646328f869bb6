"""What the compilers make of our kernels, read from the machine code; no GPU needed.

`compile_launch` compiles one launch ahead of time for a GPU architecture and reads registers,
spills and the width of global loads and stores from the cubin.
"""

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.knobs import nvidia

from .launches import Launch

ARCHITECTURES = (80, 90, 100)  # of data centres
CONSUMER = (86, 89, 120)
ALL = tuple(sorted(ARCHITECTURES + CONSUMER))
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass
class Resources:
    """Per thread: registers, bytes of local memory; per program: bytes of shared memory; of the
    code: instructions, and accesses to global memory of 16 bytes a thread (wide) and of fewer; and
    whether a trap is all that the compiler left of a kernel that asks for more than there is."""

    registers: int
    spills: int
    shared: int
    instructions: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    is_trap: bool = False


@dataclass(kw_only=True)
class Compiled:
    """One kernel as one call of an op launches it, compiled for one architecture.

    Of a CUDA kernel, `call` is its template arguments and num_warps the most that it is launched
    with; dynamic shared memory is not in its resources, as a launch decides it.
    """

    backend: str
    kernel: str  # swiglu.forward
    call: str
    arch: int
    width: int | None = None
    dtype: str = ""
    num_warps: int
    constants: dict = field(default_factory=dict)
    resources: Resources


def specialise(launch: Launch) -> tuple[dict, dict, dict]:
    """What selects the code: types, constants by position, and which pointers are aligned."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            is_aligned = value.storage_offset() * value.element_size() % 16 == 0
            if is_aligned and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return signature, constants, attributes


def compile_launch(launch: Launch, architecture: int) -> Resources:
    """Compile for sm_<architecture>; memory starts where torch's allocator aligns it."""
    return compile_and_read(launch, architecture)[0]


def compile_and_read(launch: Launch, architecture: int) -> tuple[Resources, str]:
    """`compile_launch` and the machine code as text."""
    source = ASTSource(launch.kernel, *specialise(launch))
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    usage, sass = disassemble(compiled.asm["cubin"])
    return resources(usage, sass, compiled.metadata.shared), sass


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, by the disassembler that Triton ships."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = run(nvidia.cuobjdump.path, "--dump-resource-usage", path)
        return usage, run(nvidia.nvdisasm.path, "-c", path)


def resources(usage: str, sass: str, shared: int) -> Resources:
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    stack, local = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("STACK", "LOCAL"))
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", sass, re.M)

    def count(prefix: str, wide: bool) -> int:
        return sum(
            op.split(".")[0] in (prefix, f"{prefix}STS")  # LDGSTS: to shared memory
            and any(w in op for w in (".128", ".256")) == wide
            for op in code
        )

    moves = any(op.startswith(("LDG", "STG", "UTMA")) for op in code)  # some have a trap as well
    is_trap = not moves and any(op.startswith("BPT.TRAP") for op in code)
    return Resources(
        registers, stack + local, shared, len(code),
        count("LDG", True), count("LDG", False), count("STG", True), count("STG", False),
        is_trap,
    )  # fmt: skip


def run(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def in_processes(function: Callable, tasks: list, processes: int) -> list:
    """[function(*task) for task in tasks] by several processes; a task need not be picklable."""
    _Forked.function, _Forked.tasks = function, tasks
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return pool.map(_run_forked, range(len(tasks)), chunksize=1)


class _Forked:
    """What the processes inherit: a kernel cannot be pickled."""

    function: Callable
    tasks: list


def _run_forked(index: int):
    return _Forked.function(*_Forked.tasks[index])
