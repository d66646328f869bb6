"""What FP8 blocks (`to_fp8`) change: the error of whole networks, and the digits they draw.

    python -m benchmarks fp8 [--digits] [--per-class 100] [--folder tim/assets/mnist]

The networks of tests/golden against themselves in float64; with --digits also the trained one of
`folder`: the share of its samples that a classifier recognises, and the Fréchet distance of their
features to held-out digits, as tim.evaluation.mnist measures them. Without a GPU the 8-bit products
are emulated in float32.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tests.golden_files import GOLDEN
from tim.data import mnist
from tim.evaluation.curves import STEPS, percent
from tim.evaluation.mnist import draw, frechet_distance, frechet_error, recognised, train_classifier
from tim.training import load_export
from tim_kernels import to_fp8

from ..record import table
from ..record.rows import Fp8Error
from .fp8_stage import golden_error

ASSET = Path(__file__).parents[2] / "tim/assets/mnist"


class Digits(NamedTuple):
    steps: int
    network: str
    recognised: str
    frechet: str


DIGITS = (
    table.Column("steps", form="{}"), table.Column("network"),
    table.Column("recognised"), table.Column("Fréchet", "frechet"),
)  # fmt: skip


def digits(folder: Path, per_class: int) -> Iterator[Digits]:
    """The trained network in float32, bfloat16 and FP8, from the same noise."""
    classifier, _ = train_classifier()
    real, _ = mnist.load("held_out")
    for name, dtype in dict(float32=torch.float32, bfloat16=torch.bfloat16, FP8=None).items():
        network, transport, _ = load_export(folder)
        network.to(dtype or torch.bfloat16)
        if dtype is None:
            to_fp8(network)
        for steps in STEPS:
            images, labels = draw(network, transport, num_steps=steps, per_class=per_class, seed=0)
            share = recognised(classifier, images, labels)
            distance = frechet_distance(classifier, images, real)
            error = frechet_error(classifier, images, real)
            yield Digits(steps, name, percent(*share.values()), f"{distance:.2f} ± {error:.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--digits", action="store_true", help="draw digits, too: ten minutes")
    parser.add_argument("--per-class", type=int, default=100, help="samples of each digit")
    parser.add_argument("--folder", type=Path, default=ASSET, help="what `tim train` exported")
    args = parser.parse_args(argv)
    errors = [golden_error(path) for path in sorted(GOLDEN.glob("model_*.safetensors"))]
    print(table.markdown(errors, Fp8Error.columns), flush=True)
    if args.digits:
        rows = sorted(digits(args.folder, args.per_class), key=lambda row: row.steps)
        print("\n" + table.markdown(rows, DIGITS))
