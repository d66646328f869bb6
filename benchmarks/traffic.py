"""Static cost model: launches, bytes, FLOPs and roofline time per op, block and model.

    python -m benchmarks.traffic [--model c2i-xl|t2i-xl] [--gpu H100] [--bandwidth 3.0] [--ops]

Counted on meta tensors by the rule in `benchmarks.counting`, for the datasheet numbers of a GPU or
for numbers of your own (those that `benchmarks.gate` measured, say). A block is the difference
between models of depth d and d − 1, so that embedders and head drop out.
"""

import argparse
from collections.abc import Iterable
from typing import NamedTuple

import torch

from tests.eager import EagerTiM
from tim_kernels import use_backend

from .calls import calls
from .counting import ATTENTION, GEMM, REST, Total, Work, count, total
from .machine import Limits
from .shapes import MODELS, Model

# Bytes a second and dense bfloat16 FLOP a second, from NVIDIA's datasheets: A100 80GB SXM
# (nvidia-a100-datasheet), H100 SXM (h100-datasheet), H200 SXM (hpc-datasheet-sc23-h200), one B200
# of a DGX B200 (dgx-b200-datasheet; the sheets give FLOPs with sparsity, twice these).
GPUS = {
    "A100": Limits(2.039e12, 312e12),
    "H100": Limits(3.35e12, 989e12),
    "H200": Limits(4.8e12, 989e12),
    "B200": Limits(8.0e12, 2250e12),
}


class Case(NamedTuple):
    """A published model at a batch; target and floor of a block are of all but GEMM, attention."""

    model: Model
    batch: int
    target: tuple[int, float]  # launches, KB a token, forward
    floor: tuple[int, float]

    @property
    def tokens(self) -> int:
        return self.batch * self.model.tokens


# The targets are design section 6's. The floors count each tensor once, in elements a token: 4·C
# for each gated residual with LayerNorm and modulation, 4·C for q and k, 2·C for the
# cross-attention's q, 8·C for SwiGLU.
CASES = {
    "c2i-xl": Case(MODELS["c2i-xl"], 256, (5, 50), (4, 20 * 1152 * 2 / 1e3)),
    "t2i-xl": Case(MODELS["t2i-xl"], 64, (8, 65), (6, 26 * 1152 * 2 / 1e3)),
}
CONTENDERS = ("eager", "reference", "fused")  # eager: the published model as plain PyTorch
MODES = ("inference", "training")


def count_model(case: Case, contender: str, mode: str, depth: int | None = None) -> list[Work]:
    """One forward of a bfloat16 model, in training also its backward from a given gradient."""
    params = case.model._replace(depth=depth).network_params()
    cls = EagerTiM
    if contender != "eager":
        from tim.models import TiMTransformer2DModel as cls
    with torch.device("meta"):
        model = cls(**params).bfloat16()
        x = torch.empty(case.batch, *case.model.latent, dtype=torch.bfloat16)
        t, r = torch.empty(2, case.batch)
        if case.model.text_tokens:
            y = torch.empty(
                case.batch, case.model.text_tokens, params["cap_feat_dim"], dtype=x.dtype
            )
        else:
            y = torch.empty(case.batch, dtype=torch.long)

    def step():
        model.zero_grad()
        with torch.set_grad_enabled(mode == "training"):
            out = model(x, t, r, y)
        if mode == "training":
            out.backward(torch.empty_like(out))

    with use_backend("triton" if contender == "fused" else "reference"):
        return count(step)


def count_ops(case: Case) -> dict[str, dict[str, list[Work]]]:
    """Each op at the shapes of the case, forward, by contender; eager where it has a twin."""
    shapes = dict(batch=case.batch, grid=case.model.grid, latent=case.model.latent)
    counts = {}
    for call in calls(**shapes):
        counts[call.name] = {}
        if call.eager is not None:
            counts[call.name]["eager"] = count(call.run, "forward", call.eager)
        with use_backend("triton"):
            counts[call.name]["fused"] = count(call.run, "forward")
    return counts


def block_totals(
    case: Case, contender: str, mode: str, limits: Limits, by: str = "category"
) -> dict[str, Total]:
    """What one more block adds to a model, by a field of its launches."""
    more, fewer = (count_model(case, contender, mode, depth) for depth in (3, 2))

    def part(work: Iterable[Work], key: str) -> Total:
        return total((w for w in work if getattr(w, by) == key), limits)

    keys = dict.fromkeys(getattr(w, by) for w in more)
    return {key: part(more, key) - part(fewer, key) for key in keys}


def print_model(name: str, case: Case, limits: Limits) -> None:
    print(
        f"\n{name}, {case.tokens:,} image tokens, bfloat16: one block, KB a token; rest is all but"
        " GEMM and attention.\nTimes are rooflines: of the rest, of the block and of the model.\n\n"
        f"{'':<22}{'rest':>16}{'GEMM':>16}{'attention':>16}{'rest':>9}{'block':>16}"
        f"{'model':>34}\n{'':<22}" + f"{'launches':>9}{'KB':>7}" * 3
        + f"{'µs':>9}{'GFLOP':>8}{'µs':>8}{'launches':>10}{'GB':>8}{'TFLOP':>8}{'ms':>8}"
    )  # fmt: skip
    for mode in MODES:
        for contender in CONTENDERS:
            block = block_totals(case, contender, mode, limits)
            line = f"{mode:<11}{contender:<11}"
            for category in (REST, GEMM, ATTENTION):
                kilobytes = block[category].bytes / case.tokens / 1e3
                line += f"{block[category].launches:>9}{kilobytes:>7.1f}"
            line += f"{block[REST].seconds * 1e6:>9.0f}"
            line += f"{sum(part.flops for part in block.values()) / 1e9:>8.0f}"
            line += f"{sum(part.seconds for part in block.values()) * 1e6:>8.0f}"
            model = total(count_model(case, contender, mode), limits)
            line += f"{model.launches:>10}{model.bytes / 1e9:>8.1f}{model.flops / 1e12:>8.1f}"
            print(line + f"{model.seconds * 1e3:>8.1f}")
        if mode == "inference":
            for label, (launches, kilobytes) in (("target", case.target), ("floor", case.floor)):
                seconds = kilobytes * 1e3 * case.tokens / limits.bandwidth
                print(f"{'':<11}{label:<11}{launches:>9}{kilobytes:>7.1f}{seconds * 1e6:>41.0f}")


def print_block(name: str, case: Case, limits: Limits, mode: str) -> None:
    print(f"\n{name}, fused, {mode}: what one block launches\n")
    print(f"{'launches':>8}{'KB a token':>12}{'GFLOP':>9}{'µs':>9}  operation")
    for operation, part in block_totals(case, "fused", mode, limits, by="name").items():
        if not part.bytes:  # as much in the shorter model
            continue
        print(
            f"{part.launches:>8}{part.bytes / case.tokens / 1e3:>12.2f}{part.flops / 1e9:>9.1f}"
            f"{part.seconds * 1e6:>9.1f}  {operation}"
        )


def print_ops(name: str, case: Case, limits: Limits) -> None:
    print(f"\n{name}: each op alone, forward; launches, MB, GFLOP and the roofline µs of all\n")
    columns = f"{'launches':>9}{'MB':>9}{'GFLOP':>7}{'µs':>8}"
    print(f"{'':<48}{'eager':>33}{'fused':>33}\n{'':<48}" + columns * 2)
    for op, by_contender in count_ops(case).items():
        line = f"{op:<48}"
        for contender in ("eager", "fused"):
            if contender not in by_contender:
                line += f"{'':>33}"
                continue
            part = total(by_contender[contender], limits)
            line += f"{part.launches:>9}{part.bytes / 1e6:>9.1f}{part.flops / 1e9:>7.1f}"
            line += f"{part.seconds * 1e6:>8.1f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=CASES, help="both by default")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--bandwidth", type=float, help="TB/s instead of the GPU's datasheet")
    parser.add_argument("--tflops", type=float, help="dense bf16 TFLOP/s instead of the datasheet")
    parser.add_argument("--ops", action="store_true", help="each op, and each launch of a block")
    args = parser.parse_args()
    limits = GPUS[args.gpu]
    if args.bandwidth:
        limits = limits._replace(bandwidth=args.bandwidth * 1e12)
    if args.tflops:
        limits = limits._replace(flops=args.tflops * 1e12)
    source = f"{args.gpu} by its datasheet" if limits == GPUS[args.gpu] else "Your numbers"
    print(
        f"{source}: {limits.bandwidth / 1e12:.2f} TB/s, "
        f"{limits.flops / 1e12:.0f} dense bf16 TFLOP/s. A static count; nothing was measured."
    )
    for name, case in CASES.items():
        if args.model in (None, name):
            print_model(name, case, limits)
            if args.ops:
                print_ops(name, case, limits)
                for mode in MODES:
                    print_block(name, case, limits, mode)


if __name__ == "__main__":
    main()
