"""What training a preset needs: memory and the roofline of a step, counted on meta tensors.

    python -m benchmarks training [--preset xl-256] [--batch 64] [--gpu H100] [--markdown]

Memory of one process without sharding: float32 weights, gradients, two moments and the average
(20 bytes a parameter), and what a forward in bfloat16 keeps for backward, a sample, with and
without checkpointed blocks. A step is a forward and a backward of the batch, the two forwards of
half of it by which dF/dt is taken, and the optimizer's and average's pass over the weights. It is a
lower bound of arithmetic and traffic; encoders, data and communication are not in it.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tim.models import TiMTransformer2DModel
from tim_kernels import use_backend

from ..cases.shapes import Model
from ..record.table import Column, markdown, text
from .counting import total
from .traffic import GPUS, Budget, count_model

PRESETS = {  # at the resolution and the batch of a GPU that are published
    "b-256": (Model("b-256", (8, 8), (4, 32, 32), 0, ()), 256),
    "xl-256": (Model("xl-256", (16, 16), (4, 32, 32), 0, ()), 64),
    "xl-512": (Model("xl-512", (16, 16), (32, 16, 16), 0, ()), 64),
    "t2i": (Model("t2i", (16, 16), (32, 16, 16), 256, ()), 128),
}
STATE = 20  # bytes a parameter: weight, gradient, two moments, average, float32 each
MOVED = 36  # bytes a parameter that optimizer and average read and write
DIFFERENCE = 2 * 0.5  # forwards of half of the samples, at t + ε and t − ε


class Need(NamedTuple):
    preset: str
    gpu: str
    batch: int
    parameters: float  # millions
    state: float  # GB
    kept: float  # MB a sample
    checkpointed: float  # MB a sample
    memory: float  # GB, of the batch
    step: float  # ms
    images: float  # a second


def kept(model: Model, batch: int, checkpointing: bool) -> int:
    """Bytes that a forward keeps for backward, but for the weights."""
    with torch.device("meta"):
        network = TiMTransformer2DModel(**model.network_params()).bfloat16()
    if checkpointing:
        network.enable_gradient_checkpointing()
    with use_backend("triton"):
        return kept_by(network, *model.meta_inputs(batch, torch.bfloat16))


def kept_by(module: nn.Module, *args) -> int:
    """Bytes that module(*args) keeps for backward, but for its weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    found: dict[int, Tensor] = {}  # by storage; held, so that no other takes its place

    def pack(tensor: Tensor) -> Tensor:
        if (key := tensor.untyped_storage()._cdata) not in weights:
            found[key] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*args)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def need(preset: str, gpu: str, batch: int | None = None) -> Need:
    model, published = PRESETS[preset]
    batch, limits = batch or published, GPUS[gpu]
    with torch.device("meta"):
        network = TiMTransformer2DModel(**model.network_params())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    plain, again = (kept(model, 8, checkpointing) / 8 for checkpointing in (False, True))
    budget = Budget(model, batch, (0, 0), (0, 0))
    training, forward = (
        total(count_model(budget, "fused", mode), limits).seconds
        for mode in ("training", "inference")
    )
    seconds = training + DIFFERENCE * forward + MOVED * parameters / limits.bandwidth
    memory = STATE * parameters + batch * plain
    return Need(
        preset, gpu, batch, parameters / 1e6, STATE * parameters / 1e9, plain / 1e6, again / 1e6,
        memory / 1e9, 1e3 * seconds, batch / seconds,
    )  # fmt: skip


COLUMNS = [
    Column("preset"), Column("GPU", "gpu"), Column("batch", form="{}"),
    Column("parameters, M", "parameters", "{:.0f}"), Column("state, GB", "state", "{:.1f}"),
    Column("kept a sample, MB", "kept", "{:.0f}"),
    Column("checkpointed, MB", "checkpointed", "{:.0f}"), Column("in all, GB", "memory", "{:.0f}"),
    Column("step, ms", "step", "{:.0f}"), Column("images a second", "images", "{:.0f}"),
]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, help="all by default")
    parser.add_argument("--gpu", choices=GPUS, help="all by default")
    parser.add_argument("--batch", type=int, help="of a GPU; the published one by default")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(argv)
    presets = [args.preset] if args.preset else PRESETS
    gpus = [args.gpu] if args.gpu else GPUS
    needs = [need(preset, gpu, args.batch) for preset in presets for gpu in gpus]
    print((markdown if args.markdown else text)(needs, COLUMNS))
