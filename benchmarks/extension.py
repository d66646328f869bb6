"""What nvcc makes of the kernels in csrc/, read from the machine code; no GPU needed."""

import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from triton.knobs import nvidia

import setup as build_script

from .cubin import Resources, _run, disassemble, resources

ROOT = Path(__file__).parents[1]
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
CUDA_TYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "double": "fp64"}


@dataclass
class Kernel:
    """A __global__ function with its template arguments, compiled for one architecture."""

    name: str  # ada_layer_norm.forward_kernel<1152, bf16, bf16>
    arch: int
    threads: int  # a block, at most
    resources: Resources  # dynamic shared memory is not in them: a launch decides it


def obstacle() -> str | None:
    """Why csrc/ cannot be compiled here; None if it can."""
    if build_script.nvcc() is None:
        return "nvcc was not found"
    return None if build_script.torch_folder() else "torch's headers were not found"


def sources() -> list[Path]:
    return sorted((ROOT / "csrc").glob("*.cu"))


def kernels(architectures, names=(), processes: int | None = None) -> list[Kernel]:
    """Every kernel of the sources called one of `names` (all by default)."""
    chosen = [path for path in sources() if not names or path.stem in names]
    jobs = [(path, arch) for path in chosen for arch in architectures]
    with ThreadPoolExecutor(processes or os.cpu_count()) as pool:
        return [kernel for found in pool.map(lambda job: _compile(*job), jobs) for kernel in found]


def _compile(source: Path, arch: int) -> list[Kernel]:
    flags = build_script.compile_flags(build_script.torch_folder())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        command = [build_script.nvcc(), *flags, f"-arch=sm_{arch}", "-cubin", str(source)]
        run = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"nvcc failed on {source.name}:\n{run.stderr}")
        elf = _run(nvidia.cuobjdump.path, "-elf", path)
        usage, sass = disassemble(path.read_bytes())
    threads = {}
    for name, info in re.findall(r"^\.nv\.info\.(\w+)\n(.*?)(?=^\.|\Z)", elf, re.M | re.S):
        threads[name] = int(re.search(r"MAX_THREADS\s.*?Value:\s+(0x\w+)", info, re.S)[1], 16)
    of_usage = dict(re.findall(r"^ Function (\w+):\n(.*)$", usage, re.M))
    code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\t\.section|\Z)", sass, re.M | re.S))
    shared = {name: int(re.search(r"SHARED:(\d+)", line)[1]) for name, line in of_usage.items()}
    return [
        Kernel(
            f"{source.stem}.{short_name(name).removeprefix(f'{source.stem}_')}", arch,
            threads[name], resources(line, code[name], shared[name]),
        )
        for name, line in of_usage.items()
    ]  # fmt: skip


def short_name(mangled: str) -> str:
    """ada_layer_norm_forward_kernel<…, bf16, fp32> of a mangled kernel of an unnamed namespace."""
    name = _run("c++filt", mangled).strip()
    name = re.search(r"(?:\(anonymous namespace\)|_GLOBAL__N_\w*)::(.*?)\(", name)[1]
    for type_name, short in CUDA_TYPES.items():
        name = name.replace(type_name, short)
    return name
