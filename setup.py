"""Build script: the metadata are in pyproject.toml, the CUDA extension is built here.

The extension is plain C++ on torch's stable ABI, so nvcc and the headers of any torch ≥ 2.11 with
CUDA build it, and one file serves every later torch and every Python. Without them the package
installs all the same; tim_kernels/_cuda.json says what was built, or why nothing was.

    TIM_KERNELS_CUDA_ARCHS   "80 90 100+PTX" by default; "none" builds no extension
    TIM_KERNELS_NAMESPACE    of torch.ops for the extension, "tim_kernels_cuda" by default: two
                             builds under names of their own can live in one process

`python setup.py hub --out build/hub` lays out a repository for Hugging Face's kernel hub.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1, enough for build_ext --inplace
    from wheel.bdist_wheel import bdist_wheel

SOURCES = sorted(str(path) for end in ("cu", "cpp") for path in Path("csrc").glob(f"*.{end}"))
OLDEST_TORCH = "0x020b000000000000"  # 2.11, in TORCH_TARGET_VERSION's notation
OLDEST_NVCC = 13
PTXAS_LOG = Path("build/ptxas.log")  # registers and spills of every kernel


def torch_folder() -> Path | None:
    """The installed torch; pip's build isolation hides it from import, but not from the disk."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        return Path(spec.origin).parent
    for name in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(name)) / "torch"
        if (folder / "version.py").exists():
            return folder
    return None


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def nvcc_version(command: str) -> str:
    out = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", out).group(1)


def architectures() -> list[str]:
    """["80", "90", "100+PTX"]; "9.0" and "sm_90" are read as "90"."""
    text = os.environ.get("TIM_KERNELS_CUDA_ARCHS") or "80 90 100+PTX"
    names = []
    for word in re.split(r"[\s,;]+", text.strip()):
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)(\+PTX)?", word, re.IGNORECASE)
        if match is None:
            sys.exit(f"TIM_KERNELS_CUDA_ARCHS must be like '80 90 100+PTX' or 'none', got {text!r}")
        names.append(match[1] + match[2] + (match[3] or "").upper())
    return names


def namespace() -> str:
    """In which the extension registers its operators."""
    name = os.environ.get("TIM_KERNELS_NAMESPACE") or "tim_kernels_cuda"
    if re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) is None:
        sys.exit(f"TIM_KERNELS_NAMESPACE must be a name like 'tim_kernels_cuda', got {name!r}")
    return name


def why_not_built() -> str | None:
    """Why the extension is not built; None if it is."""
    if os.environ.get("TIM_KERNELS_CUDA_ARCHS", "").strip().lower() == "none":
        return "it was not built: TIM_KERNELS_CUDA_ARCHS was 'none'"
    if not SOURCES:
        return "it was not built: the source tree had no csrc/"
    if (command := nvcc()) is None:
        return "it was not built: nvcc was not found"
    if int((version := nvcc_version(command)).partition(".")[0]) < OLDEST_NVCC:
        return f"it was not built: nvcc was {version}, and {OLDEST_NVCC}.0 is needed"
    if (torch := torch_folder()) is None:
        return "it was not built: torch was not installed yet (install torch first)"
    if not (torch / "lib" / "libtorch_cuda.so").exists():
        return "it was not built: the torch it was built with has no CUDA"
    return None


def compile_flags(torch: Path) -> list[str]:
    """nvcc's, for every source and architecture."""
    return [
        "-std=c++17", "-O3", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}",
        f"-DTIM_KERNELS_NAMESPACE={namespace()}",
        f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}",
        "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v",
    ]  # fmt: skip


class BuildExtension(build_ext):
    """Compile every source for every architecture with nvcc, in parallel, and link them."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # for any Python

    def run(self) -> None:
        super().run()
        folder = Path("." if self.inplace else self.build_lib, "tim_kernels")
        if reason := why_not_built():
            print(f"no CUDA extension: {reason}")
            note(folder, {"reason": reason})
        else:
            built = {"architectures": architectures(), "nvcc": nvcc_version(nvcc())}
            note(folder, built | {"sources": source_hash(), "namespace": namespace()})

    def build_extension(self, extension: Extension) -> None:
        torch, names = torch_folder(), architectures()
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        codes = []
        for name in names:
            number = name.removesuffix("+PTX")
            codes += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
            if name != number:
                codes += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
        flags = compile_flags(torch)

        def compile_one(source: str) -> tuple[Path, str]:
            target = objects / (Path(source).name + ".o")
            command = [nvcc(), "-c", source, "-o", str(target), *flags, *codes]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                sys.exit(f"nvcc failed on {source}:\n{run.stderr}")
            return target, f"# {source}\n{run.stderr}"

        with ThreadPoolExecutor(self.parallel or os.cpu_count()) as pool:
            results = list(pool.map(compile_one, extension.sources))
        PTXAS_LOG.parent.mkdir(exist_ok=True)
        PTXAS_LOG.write_text("".join(log for _, log in results))
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                nvcc(), "-shared", "-o", str(library), *(str(target) for target, _ in results),
                f"-L{torch / 'lib'}", "-ltorch_cuda", "-ltorch_cpu", "-ltorch", "-lc10",
            ],
            check=True,
        )  # fmt: skip
        print(f"built {library.name} for {', '.join(names)}; resources are in {PTXAS_LOG}")


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        if reason := why_not_built():
            print(f"no CUDA extension: {reason}")
            root = "." if self.editable_mode else self.build_lib
            note(Path(root, "tim_kernels"), {"reason": reason})


class Wheel(bdist_wheel):
    """The library needs a platform, but no Python of its own."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def source_hash() -> str:
    """Of csrc/: whether a library is of these sources."""
    return digest(Path(__file__).parent.glob("csrc/*"))


def digest(paths: Iterable[Path]) -> str:
    """Of the files' names and contents."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def note(folder: Path, what: dict) -> None:
    """Say beside the package what was built; `tim_kernels.dispatch.extension` reads it."""
    (folder / "_cuda.json").write_text(json.dumps(what) + "\n")
    if "reason" in what:
        (folder / "_cuda.so").unlink(missing_ok=True)  # of an earlier build


class Hub(Command):
    """Lay out build/<variant> as the package `kernels` loads it, beside an installed tim_kernels:
    without the extension for every machine, and with it where it can be built.

    A build's name, that of its module and of its operators in torch.ops, is of its sources.
    """

    description = "lay out a repository for Hugging Face's kernel hub"
    user_options = [("out=", "o", "folder of the repository, build/hub by default")]

    def initialize_options(self) -> None:
        self.out = "build/hub"

    def finalize_options(self) -> None:
        self.files = sorted(p for p in Path("tim_kernels").rglob("*") if self.is_source(p))
        self.hash = digest([*self.files, *Path("csrc").glob("*")])

    @staticmethod
    def is_source(path: Path) -> bool:
        return path.suffix in (".json", ".py", ".typed") and path.name != "_cuda.json"

    def run(self) -> None:
        without = {"reason": "this build for the kernel hub, torch-universal, is without it"}
        self.lay_out("torch-universal", {"type": "cpu"}, without)
        if reason := why_not_built():
            print(f"no CUDA variant: {reason}")
            return
        os.environ.setdefault("TIM_KERNELS_NAMESPACE", f"tim_kernels_cuda_{self.hash}")
        with tempfile.TemporaryDirectory() as folder:
            self.reinitialize_command("build_ext", inplace=False, build_lib=folder)
            self.run_command("build_ext")
            built = Path(folder, "tim_kernels")
            what = json.loads((built / "_cuda.json").read_text())
            cuda = what["nvcc"].replace(".", "")
            archs = [re.sub(r"(\d)(?!\d)", r".\1", name) for name in what["architectures"]]
            variant = self.lay_out(
                f"torch-stable-abi211-cu{cuda}-{platform.machine()}-linux",
                {"type": "cuda", "archs": archs},
                what,
            )
            shutil.copy(built / "_cuda.so", variant)

    def lay_out(self, name: str, backend: dict, built: dict) -> Path:
        variant = Path(self.out, "build", name)
        shutil.rmtree(variant, ignore_errors=True)
        for path in self.files:
            target = variant / path.relative_to("tim_kernels")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        metadata = {
            "id": f"_tim_kernels_{name.split('-')[1]}_{self.hash}", "name": "tim-kernels",
            "version": 1, "license": "Apache-2.0", "python-depends": [], "backend": backend,
        }  # fmt: skip
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        shutil.copy("LICENSE", variant)
        note(variant, built)
        print(f"laid out {variant}")
        return variant


if __name__ == "__main__":
    setup(
        ext_modules=[] if why_not_built() else [Extension("tim_kernels._cuda", SOURCES)],
        cmdclass={
            "build_ext": BuildExtension,
            "build_py": BuildPython,
            "bdist_wheel": Wheel,
            "hub": Hub,
        },
    )
