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
from torch import Tensor

from tests.golden_files import GOLDEN, Golden, relative_error
from tim.data import mnist
from tim.evaluation.curves import STEPS, percent
from tim.evaluation.mnist import draw, frechet_distance, frechet_error, recognised, train_classifier
from tim.models import TiMTransformer2DModel
from tim.training import load_export
from tim_kernels import to_fp8

from ..record import table

ASSET = Path(__file__).parents[2] / "tim/assets/mnist"


class Error(NamedTuple):
    network: str
    width: int
    bfloat16: float
    fp8: float
    apart: float


class Digits(NamedTuple):
    steps: int
    network: str
    recognised: str
    frechet: str


ERRORS = (
    table.Column("network"), table.Column("width", form="{}"),
    table.Column("bfloat16 to float64", "bfloat16", "{:.2%}"),
    table.Column("FP8 to float64", "fp8", "{:.2%}"),
    table.Column("FP8 to bfloat16", "apart", "{:.2%}"),
)  # fmt: skip
DIGITS = (
    table.Column("steps", form="{}"), table.Column("network"),
    table.Column("recognised"), table.Column("Fréchet", "frechet"),
)  # fmt: skip


def golden_error(path: Path) -> Error:
    """‖sample − other‖ / ‖other‖ of one golden network at its inputs."""
    golden = Golden(path)
    x, t, r, y = (golden.group("input")[name] for name in ("x", "t", "r", "y"))

    def sample(dtype: torch.dtype, is_fp8: bool = False) -> Tensor:
        model = TiMTransformer2DModel(**golden.meta["params"])
        model.load_state_dict(golden.group("state"))
        model = model.to(dtype).eval()
        if is_fp8:
            to_fp8(model)
        text = y.to(dtype) if y.is_floating_point() else y
        with torch.no_grad():
            return model(x.to(dtype), t, r, text)

    exact, plain = sample(torch.float64), sample(torch.bfloat16)
    fp8 = sample(torch.bfloat16, is_fp8=True)
    of = relative_error
    width = golden.meta["params"]["hidden_size"]
    return Error(path.stem, width, of(plain, exact), of(fp8, exact), of(fp8, plain))


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
    print(table.markdown(errors, ERRORS), flush=True)
    if args.digits:
        rows = sorted(digits(args.folder, args.per_class), key=lambda row: row.steps)
        print("\n" + table.markdown(rows, DIGITS))
