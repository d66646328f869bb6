"""Pictures of many sizes: packed in one row, padded to the largest, and one by one.

    python -m benchmarks packed [--steps 400] [--rounds 5] [--out docs/packed]

Counted for TiM-XL on a pack of ImageNet's sizes; CPU seconds of a small network by turns; and
MNIST's digits at their own sizes, trained packed and padded on the same pictures, noise and times.
CPU seconds are those of this process, so that what else runs here matters less.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tests.eager import randomise
from tim import config
from tim.data.packing import mixed
from tim.models import TiMTransformer2DModel, pack
from tim.objective import TransitionObjective
from tim.training import loop
from tim.training.conditioning import ClassConditioning
from tim.training.latents import Given
from tim.training.log import read_log
from tim.training.parts import Parts
from tim.training.streams import TokenPacks
from tim.transports import make
from tim_kernels import use_backend

from ..cases.ragged import Boxes, OneByOne, Padded, imagenet_sizes
from ..cases.shapes import MODELS
from ..clock import machine
from ..record.provenance import commit_hash, now, save, source_hash
from ..static.counting import ATTENTION, Work, count, total
from ..static.traffic import GPUS

TOKENS = 16384
OF_XL = dict(input_size=16, patch_size=1, in_channels=32, encoder_depth=1, z_dim=None)
SMALL = dict(
    input_size=16, patch_size=1, in_channels=32, hidden_size=192, encoder_depth=1, depth=4,
    num_heads=4, num_classes=10, z_dim=None, lora_hidden_size=64,
)  # fmt: skip
PACKED, PADDED, ONE_BY_ONE = "packed", "padded", "one by one"
OBJECTIVES = {
    "flow matching": dict(diffusion_ratio=1.0, consistency_ratio=0.0),
    "transitions": dict(diffusion_ratio=0.5, consistency_ratio=0.1),
}


def ways(network: TiMTransformer2DModel, masked: bool = True) -> dict[str, nn.Module]:
    return {PACKED: network, PADDED: Padded(network, masked), ONE_BY_ONE: OneByOne(network)}


def sizes_of_a_pack(tokens: int) -> list[tuple[int, int]]:
    """Grids of DC-AE's latents in the first of many packs; none has more than a quarter of it."""
    sizes = imagenet_sizes(10_000) // 32
    sizes = sizes[sizes.prod(axis=1) <= tokens // 4]
    first = mixed(sizes.prod(axis=1), tokens, seed=0)[0]
    return [tuple(size) for size in sizes[first].tolist()]


def counted(gpu: str = "H100") -> dict[str, dict]:
    """A block's forward in bfloat16, of TiM-XL: launches, bytes, FLOPs and roofline seconds.

    Packed attention counts as the one launch that varlen_attn makes. The padded batch is counted
    without its mask, as if that cost nothing."""
    sizes, found = sizes_of_a_pack(TOKENS), {}
    for name in (PACKED, PADDED, ONE_BY_ONE):
        totals = []
        for depth in (1, 2):
            params = MODELS["c2i-xl"].network_params() | OF_XL | dict(depth=depth)
            with torch.device("meta"):
                network = TiMTransformer2DModel(**params).bfloat16().eval()
                latents = [torch.empty(32, *size, dtype=torch.bfloat16) for size in sizes]
                tokens, packing = pack(latents, 1)
                t, y = torch.empty(len(sizes)), torch.empty(len(sizes), dtype=torch.int64)

            model = ways(network, masked=False)[name]
            with use_backend("triton"), torch.no_grad():
                work = count(partial(model, tokens, t, t, y, packing=packing))
            totals.append(total(_at_once(work, depth) if name == PACKED else work, GPUS[gpu]))
        one, two = totals
        found[name] = (two - one)._asdict()
    return {"pack": _shape(sizes), **found}


def _shape(sizes: list[tuple[int, int]]) -> dict[str, int]:
    lengths = [h * w for h, w in sizes]
    return dict(pictures=len(sizes), tokens=sum(lengths), padded=max(lengths) * len(sizes))


def _at_once(work: list[Work], blocks: int) -> list[Work]:
    """With attention as one launch a block, and no copy that puts the pictures together."""
    parts = [each for each in work if each.category == ATTENTION]
    size = sum(w.bytes for w in parts) // blocks, sum(w.flops for w in parts) // blocks
    one = Work("varlen_attn", ATTENTION, *size)
    others = [w for w in work if w.category != ATTENTION and w.name != "cat"]
    return [*others, *[one] * blocks]


def clocked(rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds of a forward, and of a training step's loss and gradients, by turns: the median,
    and that of the ratio to packed within a turn."""
    sizes = sizes_of_a_pack(1024)
    network = randomise(TiMTransformer2DModel(**SMALL))
    g = torch.Generator().manual_seed(0)
    (x, packing), (z, _) = (
        pack([torch.randn(32, *size, generator=g) for size in sizes], 1) for _ in range(2)
    )
    y, t = torch.arange(len(sizes)) % 10, torch.rand(len(sizes), generator=g) * 0.5 + 0.4
    objective = TransitionObjective(make("OT_FM"))
    n = len(sizes) // 2
    r = torch.where(torch.arange(len(sizes)) < n, t, t / 2)

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(x, t, r, y, packing=packing)

    def step(model: nn.Module) -> None:
        network.zero_grad()
        given = dict(t=t, r=r, n_diffusion=n, packing=packing)
        objective(model, x, z, y, **given).weighted.backward()

    found = {}
    for task, run in (("forward", forward), ("training step", step)):
        seconds = {name: [] for name in ways(network)}
        for turn in range(rounds + 1):
            for name, model in ways(network).items():
                begin = time.process_time()
                run(model)
                if turn:  # the first warms up
                    seconds[name].append(time.process_time() - begin)
        of_packed = seconds[PACKED]
        found[task] = {
            name: dict(
                cpu_seconds=statistics.median(own),
                to_packed=statistics.median(
                    a / b for a, b in zip(own, of_packed, strict=True)
                ),
            )
            for name, own in seconds.items()
        }  # fmt: skip
    return {"pack": _shape(sizes), **found}


def digits_config(objective: str, steps: int) -> DictConfig:
    network = dict(input_size=20, patch_size=2, class_dropout_prob=0.1)
    training = dict(
        max_train_steps=steps, checkpointing_steps=steps, validation_steps=10 * steps, log_steps=20,
        lr_scheduler="constant_with_warmup", lr_scheduler_params=None, lr_warmup_steps=50,
    )  # fmt: skip
    model = dict(network=dict(params=network), transition_loss=OBJECTIVES[objective])
    changes = dict(model=model, training=training)
    return OmegaConf.merge(config.load("mnist"), changes)


def trained(name: str, objective: str, steps: int, tokens: int = 2048) -> dict:
    """Digits at their own sizes: the log's losses, and CPU seconds of all steps."""
    boxes = Boxes(2)
    packs = TokenPacks(boxes, 2, tokens)
    parts = Parts(
        boxes, ClassConditioning(10, 0.1), (1, 20, 20), Given("image"), sampler=packs,
        is_packed=True, images_per_batch=packs.images_per_pack,
    )  # fmt: skip
    loop.SAMPLE_STEPS = (1,)
    with tempfile.TemporaryDirectory() as folder:
        trainer = loop.Trainer(digits_config(objective, steps), Path(folder), parts)
        trainer.model = ways(trainer.state.network)[name]
        begin = time.process_time()
        trainer.run()
        seconds = time.process_time() - begin
        log = read_log(Path(folder) / "log.jsonl")
    return dict(
        cpu_seconds=seconds, pictures=trainer.state.images, efficiency=float(packs.efficiency),
        steps=[line["step"] for line in log], denoising=[line["denoising"] for line in log],
    )  # fmt: skip


def compared(objective: str, steps: int) -> dict:
    """Packed and padded, to the same number of pictures."""
    found = {name: trained(name, objective, steps) for name in (PACKED, PADDED)}
    curves = [found[name]["denoising"] for name in (PACKED, PADDED)]
    pairs = list(zip(*curves, strict=True))
    mean, other = map(statistics.mean, curves)
    found["largest_difference_of_losses"] = max(abs(a - b) / b for a, b in pairs)
    found["difference_of_mean_losses"] = abs(mean - other) / other
    found["time_of_padded"] = found[PADDED]["cpu_seconds"] / found[PACKED]["cpu_seconds"]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="of training on digits; 0: none")
    parser.add_argument("--rounds", type=int, default=5, help="of the small network")
    parser.add_argument("--out", type=Path, help="a folder for results.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = {
        "commit": commit_hash(), "sources": source_hash(), "started": now(),
        "machine": machine.describe("cpu"), "load_before": os.getloadavg()[0],
        "counted": counted(), "clocked": clocked(args.rounds),
    }  # fmt: skip
    if args.steps:
        data["digits"] = {name: compared(name, args.steps) for name in OBJECTIVES}
    data["ended"] = now()
    for name in ("counted", "clocked", "digits"):
        print(name, data.get(name))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        save(data, args.out / "results.json")
