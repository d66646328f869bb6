"""What nvcc makes of the kernels in csrc/, read from the machine code; no GPU needed."""

import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from triton.knobs import nvidia

import setup as build_script

from ..record.provenance import ROOT
from .cubin import Compiled, disassemble, resources, run
from .launches import without_folder

TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
CUDA_TYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "double": "fp64"}


def why_not() -> str | None:
    """Why csrc/ cannot be compiled here; None if it can."""
    if build_script.nvcc() is None:
        return "nvcc was not found"
    return None if build_script.torch_folder() else "torch's headers were not found"


def sources() -> list[Path]:
    return sorted((ROOT / "csrc").glob("*.cu"))


def kernels(architectures, names=(), processes: int | None = None) -> list[Compiled]:
    """Every kernel of the sources called one of `names` (all by default)."""
    return [kernel for kernel, _ in read(architectures, names, processes)]


def read(architectures, names=(), processes: int | None = None) -> list[tuple[Compiled, str]]:
    """The same, and the machine code of each as text."""
    chosen = [path for path in sources() if not names or path.stem in names]
    jobs = [(path, arch) for path in chosen for arch in architectures]
    with ThreadPoolExecutor(processes or os.cpu_count()) as pool:
        return [kernel for found in pool.map(lambda job: _compile(*job), jobs) for kernel in found]


def _compile(source: Path, arch: int) -> list[tuple[Compiled, str]]:
    flags = build_script.compile_flags(build_script.torch_folder())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        command = [build_script.nvcc(), *flags, f"-arch=sm_{arch}", "-cubin", str(source)]
        done = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source.name}:\n{done.stderr}")
        elf = run(nvidia.cuobjdump.path, "-elf", path)
        usage, sass = disassemble(path.read_bytes())
    threads = {}
    for name, info in re.findall(r"^\.nv\.info\.(\w+)\n(.*?)(?=^\.|\Z)", elf, re.M | re.S):
        threads[name] = int(re.search(r"MAX_THREADS\s.*?Value:\s+(0x\w+)", info, re.S)[1], 16)
    of_usage = dict(re.findall(r"^ Function (\w+):\n(.*)$", usage, re.M))
    code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\t\.section|\Z)", sass, re.M | re.S))
    shared = {name: int(re.search(r"SHARED:(\d+)", line)[1]) for name, line in of_usage.items()}
    found = []
    for mangled, line in of_usage.items():
        name, angle, arguments = short_name(mangled).partition("<")
        kernel = Compiled(
            backend="cuda", kernel=f"{source.stem}.{without_folder(name, source.stem)}",
            call=angle + arguments, arch=arch, num_warps=threads[mangled] // 32,
            resources=resources(line, code[mangled], shared[mangled]),
        )  # fmt: skip
        found.append((kernel, code[mangled]))
    return found


def short_name(mangled: str) -> str:
    """ada_layer_norm_forward_kernel<…, bf16, fp32> of a mangled kernel of an unnamed namespace."""
    name = run("c++filt", mangled).strip()
    name = re.search(r"(?:\(anonymous namespace\)|_GLOBAL__N_\w*)::(.*?)\(", name)[1]
    for type_name, short in CUDA_TYPES.items():
        name = name.replace(type_name, short)
    return name
