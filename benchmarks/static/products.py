"""What quack-kernels compiles for sm_90a of the products that end in SwiGLU, its derivative and the
gated residual; no GPU needed, nothing is timed.

    python -m benchmarks products [--width 1152] [--dtype bfloat16 float16]

Registers and bytes of local memory a thread; the tensor cores' instruction, and of the code: loads
and stores by tiles (TMA), and narrow ones of single threads, by which rows and sums go.
"""

import argparse
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..record.table import Column, text
from .cubin import disassemble, resources

SAMPLES, TOKENS = 3, 200  # no multiple of a tile
DTYPES = "bfloat16", "float16"
CLUSTERS = 66  # of two multiprocessors, on an H100


class Product(NamedTuple):
    kernel: str
    dtype: str
    registers: int
    spills: int
    product: str
    tile_loads: int
    tile_stores: int
    narrow: int


def products(width: int, dtypes: Sequence[str]) -> Iterator[Product]:
    """Of networks of this width. Only in a process of its own: the compiler reads its environment
    when it is imported."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "QUACK_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a", "QUACK_CACHE_ENABLED": "0",
            "CUTE_DSL_KEEP_CUBIN": "1", "CUTE_DSL_DUMP_DIR": folder,
        }  # fmt: skip
        from quack.epilogue.frontend import EpiMod
        from quack.gemm_runtime import host

        from tim_kernels.linear import quack

        host.get_max_active_clusters = lambda size: CLUSTERS
        EpiMod.gemm = functools.partialmethod(EpiMod.gemm, _launch=False)
        for dtype in dtypes:
            for name, launch in _launches(quack, width, getattr(torch, dtype)).items():
                launch()
                (cubin,) = Path(folder).glob("*.cubin")
                yield _read(name, dtype, cubin.read_bytes())
                cubin.unlink()


def _launches(quack, width: int, dtype: torch.dtype) -> dict[str, Callable]:
    """Launchers of made-up arguments, as a network gives them."""
    hidden, tokens = width * 8 // 3, SAMPLES * TOKENS

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    x, both = empty(SAMPLES, TOKENS, width), empty(tokens, 2 * hidden)
    weight, bias = empty(2 * hidden, width), torch.empty(2 * hidden)
    rows, gate = torch.empty(1, width), empty(SAMPLES, 6 * width)[:, width : 2 * width]
    ends = torch.arange(SAMPLES + 1, dtype=torch.int32) * TOKENS
    packed, back = x.flatten(0, 1), empty(width, width)
    return {
        "linear_swiglu": lambda: quack.linear_swiglu(packed, weight, bias, False),
        "linear_swiglu, kept": lambda: quack.linear_swiglu(packed, weight, bias, True),
        "linear_swiglu_backward": lambda: quack.linear_swiglu_backward(
            packed, empty(width, hidden), both
        ),
        "linear_gated_residual": lambda: quack.linear_gated_residual(
            x, back, rows, x, gate, None, 0
        ),
        "linear_gated_residual, packed": lambda: quack.linear_gated_residual(
            packed, back, rows, packed, gate, ends, TOKENS
        ),
    }


def _read(name: str, dtype: str, cubin: bytes) -> Product:
    usage, sass = disassemble(cubin)
    found = resources(usage, sass, 0)
    instructions = sorted(set(re.findall(r"\bHGMMA\.(\w+)", sass)))
    return Product(
        name, dtype, found.registers, found.spills,
        ", ".join(instructions), len(re.findall(r"\bUTMALDG", sass)),
        len(re.findall(r"\bUTMASTG", sass)), found.narrow_loads + found.narrow_stores,
    )  # fmt: skip


COLUMNS = (
    Column("kernel"), Column("dtype"), Column("registers", form="{}"), Column("spills", form="{}"),
    Column("product"), Column("tile loads", "tile_loads", "{}"),
    Column("tile stores", "tile_stores", "{}"), Column("narrow", form="{}"),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    args = parser.parse_args(argv)
    print(text(products(args.width, args.dtype), COLUMNS))
