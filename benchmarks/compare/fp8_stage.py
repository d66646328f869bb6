"""FP8 on a GPU: the kernels that make it, the 8-bit product and the golden networks, each beside
bfloat16; what is wrong is not timed. Published networks are compared in networks.py.

On a CPU the product is emulated in float32, and times say nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.golden_files import GOLDEN, Golden, relative_error
from tim_kernels import to_fp8
from tim_kernels.fp8 import has_scaled_mm, quantise_rows
from tim_kernels.network.fp8_linear import Fp8Linear, Fp8Tokens

from ..cases import fp8
from ..cases.calls import Call, maker
from ..cases.shapes import PUBLISHED, SMALL, Shape
from ..clock.machine import Limits
from ..clock.timing import copies, measure, sets_needed, side_stream, storage_bytes
from ..record.rows import COMPILE, EAGER, FP8, FUSED, Fp8Error, LeftOut, Op, Row
from .comparison import WrongAnswer
from .networks import FP8_ROOM
from .ops import OpComparison

MAIN_SHAPES = ("c2i-xl, batch 64", "t2i-xl, batch 8")
ROUNDING = 2.0**-8  # of the product to bfloat16, relative, with room for tensor cores' sums
*_, CUDA = FUSED  # csrc/ has no FP8: it would be Triton's again
ODD = 1, 77  # tokens whose product is checked and not timed


class Kernel(NamedTuple):
    """A call of an op that emits FP8."""

    shape_name: str
    shape: Shape
    call: str
    direction: str = "forward"
    dtype: torch.dtype = torch.bfloat16

    @property
    def title(self) -> str:
        return f"{self.call}, {self.shape_name}"

    def call_on(self, device: str) -> Call:
        found = fp8.calls(self.shape, self.dtype, device)
        return next(call for call in found if call.name == self.call)

    def rows(self, device: str, limits: Limits, dry_run: bool) -> Iterator[Row]:
        comparison = _Kernels(self, device, limits, interpret=dry_run)
        here = [c for c in comparison.contenders if c.name != CUDA]
        comparison.contenders = sorted(here, key=lambda c: c.name == COMPILE)  # slowest, so last
        comparison.left_out.pop(CUDA, None)
        yield from comparison.rows(0.02 if dry_run else 0.1)


class _Kernels(OpComparison):
    """What values and scales stand for is compared."""

    def _answers(self, function: Callable, wrap: Callable, dtype=None) -> list[Tensor]:
        *rest, values, scales = super()._answers(function, wrap, dtype)
        return [*rest, values.double() * scales.double()]


class Product(NamedTuple):
    """The linear layer K → N of a network's block, at as many tokens as its shape has."""

    shape_name: str
    shape: Shape
    K: int
    N: int

    @property
    def title(self) -> str:
        return f"linear {self.K} to {self.N}, {self.shape_name}"

    def rows(self, device: str, limits: Limits, dry_run: bool) -> Iterator[Row]:
        """Of the plain layer in bfloat16, and of the product of what is FP8 already.

        Raises:
            WrongAnswer: the product is further off than rounding it to bfloat16 explains.
        """
        if torch.device(device).type == "cuda" and not has_scaled_mm(torch.device(device)):
            yield LeftOut(self.title, f"torch {torch.__version__} has no product for this GPU")
            return
        with torch.device(device), torch.no_grad(), side_stream(device):
            both = self._both(device, dry_run)
        yield from both

    def _both(self, device: str, dry_run: bool) -> list[Op]:
        plain = nn.Linear(self.K, self.N, dtype=torch.bfloat16).eval()
        layer, x = Fp8Linear(plain), maker(torch.bfloat16, device)(self.shape.tokens, self.K)
        for count in (*ODD, len(x)):
            self._check(layer, x[:count])
        tokens, weights = quantise_rows(x), (layer.values, layer.scales, layer.bias)

        def product(*tokens: Tensor) -> Tensor:
            return layer(Fp8Tokens(*tokens, x.dtype))

        return [
            self._timed(EAGER, plain, (x,), (plain.weight, plain.bias), device, dry_run),
            self._timed(FP8, product, tokens, weights, device, dry_run),
        ]

    def _check(self, layer: Fp8Linear, x: Tensor) -> None:
        values, scales = quantise_rows(x)
        pairs = (values, scales), (layer.values, layer.scales)
        exact = F.linear(*(v.double() * s.double() for v, s in pairs), layer.bias.double())
        error = relative_error(layer(Fp8Tokens(values, scales, x.dtype)), exact)
        if not error <= ROUNDING:
            raise WrongAnswer(f"{self.title}, {len(x)} tokens: error {error:.2e} > {ROUNDING:.2e}")

    def _timed(
        self, who: str, run: Callable, inputs: Sequence[Tensor], weights: tuple, device, dry_run
    ) -> Op:  # fmt: skip
        size = storage_bytes([*inputs, *weights])
        sets = copies(inputs, sets_needed(size, device))
        thunks = [lambda each=each: run(*each) for each in sets]
        timing = measure(thunks, device, seconds=0.02 if dry_run else 0.1)
        flops = 2 * self.shape.tokens * self.K * self.N
        return Op(
            op=f"linear {self.K} to {self.N}", direction="forward", shape=self.shape_name,
            contender=who, flops=flops, tflop_per_s=flops / timing.ms / 1e9, **timing.fields(),
        )  # fmt: skip


class GoldenNetwork(NamedTuple):
    """A golden network's error on the device."""

    path: Path

    @property
    def title(self) -> str:
        return f"{self.path.stem} in FP8"

    def rows(self, device: str, limits: Limits, dry_run: bool) -> Iterator[Row]:
        """
        Raises:
            WrongAnswer: FP8 is further off than its four bits fewer explain.
        """
        try:
            error = golden_error(self.path, device)
        except ImportError as reason:  # a bare machine
            yield LeftOut(self.title, str(reason))
            return
        if not error.fp8 <= FP8_ROOM * error.bfloat16:
            raise WrongAnswer(f"{self.title}: {error.fp8:.2%}, bfloat16 {error.bfloat16:.2%}")
        yield error


def golden_error(path: Path, device: str = "cpu") -> Fp8Error:
    """‖sample − other‖ / ‖other‖ of one golden network at its inputs."""
    from tim.models import TiMTransformer2DModel  # needs diffusers

    golden = Golden(path)
    x, t, r, y = (golden.group("input")[name].to(device) for name in ("x", "t", "r", "y"))

    def sample(dtype: torch.dtype, is_fp8: bool = False) -> Tensor:
        model = TiMTransformer2DModel(**golden.meta["params"])
        model.load_state_dict(golden.group("state"))
        model = model.to(device, dtype).eval()
        if is_fp8:
            to_fp8(model)
        text = y.to(dtype) if y.is_floating_point() else y
        with torch.no_grad():
            return model(x.to(dtype), t, r, text)

    exact, plain = sample(torch.float64), sample(torch.bfloat16)
    fp8 = sample(torch.bfloat16, is_fp8=True)
    of = relative_error
    return Fp8Error(
        network=path.stem, width=golden.meta["params"]["hidden_size"],
        bfloat16=of(plain, exact), fp8=of(fp8, exact), apart=of(fp8, plain),
    )  # fmt: skip


def cases(dry_run: bool, brief: bool = False) -> list[Product | Kernel | GoldenNetwork]:
    """The most telling first."""
    names = SMALL if dry_run else MAIN_SHAPES[:1] if brief else MAIN_SHAPES
    shapes = {name: (SMALL | PUBLISHED)[name] for name in names}
    shapes = {name: shape for name, shape in shapes.items() if not shape.grids}
    golden = sorted(GOLDEN.glob("model_*.safetensors"))[: 1 if dry_run or brief else None]
    return [
        *(Product(name, shape, K, N) for name, shape in shapes.items() for K, N in _layers(shape)),
        *map(GoldenNetwork, golden),
        *(Kernel(name, shape, call.name) for name, shape in shapes.items()
          for call in fp8.calls(shape, torch.bfloat16, "meta")),
    ]  # fmt: skip


def _layers(shape: Shape) -> list[tuple[int, int]]:
    """(K, N) of qkv, proj, fc1 and fc2."""
    C, hidden = shape.width, shape.width * 8 // 3
    return [(C, 3 * C), (C, C), (C, hidden), (hidden, C)]
