"""What the algorithm saves without any kernel: the same mathematics in fewer, larger operations.

On a CPU, in float32, with the plain PyTorch backend: what is written here comes from the way the
network is put together and not from fused kernels. Each saving and what it replaces are timed by
turns in one run; the ratio is the median over rounds.

    python -m benchmarks.savings --out benchmarks/results
"""

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from tests.eager import EagerTiM
from tim_kernels import use_backend
from tim_kernels.network.forward import condition_blocks, swiglu_mlp

from . import machine, models, published, tasks
from .provenance import commit_hash, now, save, source_hash
from .shapes import Model
from .tasks import SAMPLING, TRAINING, Contender, Task, run_once
from .timing import alternate

TOLERANCE = 1e-4  # relative, float32
MEASURED = {  # models and batches of the committed result
    "mnist": (Model("mnist", (7, 7), (1, 28, 28), 0, (16,)), 16),
    "c2i-b": (Model("b-256", (8, 8), (4, 32, 32), 0, (1,)), 1),
}


def parts(model: Model, batch: int, network: nn.Module) -> Iterator[tuple[str, Callable, Callable]]:
    """(what, as published, as here): thunks that compute the same."""
    plain = EagerTiM(**model.network_params() | dict(distance_aware=False)).requires_grad_(False)
    width = network.x_embedder.proj.weight.shape[0]
    c, delta = torch.randn(2, batch, width)
    tokens = torch.randn(batch, model.tokens, width)
    x = torch.randn(batch, *model.latent)
    t = torch.rand(batch) * 0.8 + 0.1
    y = torch.zeros(batch, dtype=torch.long)
    epsilon = published.EPSILON

    yield (
        "adaLN modulation of all blocks as grouped GEMMs",
        lambda: torch.stack([block.adaLN_modulation(c) for block in plain.blocks]),
        lambda: torch.stack([rows.modulation for rows in condition_blocks(plain.blocks, c, delta)]),
    )

    def two_forwards():
        return torch.cat([network(x, time, t / 2, y) for time in (t + epsilon, t - epsilon)])

    times = torch.cat((t + epsilon, t - epsilon))
    yield (
        "F(t + ε) and F(t − ε) as one doubled batch",
        two_forwards,
        lambda: network(torch.cat((x, x)), times, t.repeat(2) / 2, y.repeat(2)),
    )
    mlp = network.blocks[0].mlp
    yield (
        "SwiGLU's two projections as one GEMM",
        lambda: mlp(tokens),
        lambda: swiglu_mlp(mlp, tokens),
    )


def whole(model: Model, batch: int) -> Iterator[tuple[str, Callable, Callable]]:
    """Sampling and a training step: the published loop and loss, and those of `tim`."""
    case = tasks.Case("", model, batch, SAMPLING[1])
    problem = tasks.Problem(case, "cpu")
    inputs = problem.inputs()
    eager, tim = Contender("eager"), Contender("tim", models._tim, "reference", True)
    networks = [c.prepare(problem.network, model) for c in (eager, tim)]

    def sampler(contender: Contender, network: nn.Module, task: Task) -> Callable:
        return lambda: run_once(contender, task, network, inputs, problem.n_diffusion)

    def trainer(contender: Contender, network: nn.Module, task: Task) -> Callable:
        def step():
            network.zero_grad()
            loss = run_once(contender, task, network, inputs, problem.n_diffusion)
            loss.backward()
            return loss.detach()

        return step

    for task in (*SAMPLING, TRAINING[0]):
        make = trainer if task.kind == "training" else sampler
        yield (
            task.title,
            *(make(c, n, task) for c, n in zip((eager, tim), networks, strict=True)),
        )


COUNT = 3 + len(SAMPLING) + 1


def pairs(model: Model, batch: int) -> Iterator[tuple[str, Callable, Callable]]:
    torch.manual_seed(0)
    network = EagerTiM(**model.network_params()).requires_grad_(False)
    yield from parts(model, batch, network)
    yield from whole(model, batch)


def measured(
    name: str, model: Model, batch: int, number: int, rounds: int = 15
) -> tuple[Callable, Callable, dict]:
    """The saving of that number: both thunks and the row; they have been seen to agree.

    Raises:
        AssertionError: they do not.
    """
    with use_backend("reference"):
        what, before, after = next(itertools.islice(pairs(model, batch), number, None))
        _assert_same(what, before(), after())
        pair = alternate(before, after, "cpu", rounds)
    row = {
        "kind": "saving",
        "what": what,
        "model": name,
        "batch": batch,
        "dtype": "float32",
        "as_published_ms": pair.first,
        "here_ms": pair.second,
        "ratio": pair.ratio,
        "ratio_10": pair.low,
        "ratio_90": pair.high,
        "timed": f"clock, by turns, {pair.rounds} rounds",
    }
    return before, after, row


def _assert_same(what: str, before, after) -> None:
    error = float((before - after).norm() / before.norm())
    if not error <= TOLERANCE:
        raise AssertionError(f"{what}: the two differ by {error:.1e}")


def summary(row: dict) -> str:
    """One line for people."""
    times = f"{row['as_published_ms']:>10.1f} ms{row['here_ms']:>10.1f} ms"
    ratio = f"{row['ratio']:>7.2f} ({row['ratio_10']:.2f}–{row['ratio_90']:.2f})"
    return f"{row['model']:<20}{row['batch']:>4}  {row['what']:<46}{times}{ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder for <date>-cpu-savings.json"
    )
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads that wait for one another time what else runs here
    data = {
        "format": 1,
        "part": "savings",
        "dry_run": False,
        "commit": commit_hash(),
        "sources": source_hash(),
        "started": now(),
        "load_before": os.getloadavg()[0],  # of other work: below 0.5 the times can be trusted
        "machine": machine.describe("cpu"),
        "rows": [],
    }
    for name, (model, batch) in MEASURED.items():
        for number in range(COUNT):
            *_, row = measured(name, model, batch, number, args.rounds)
            data["rows"].append(row)
            print(summary(row), flush=True)
    data["ended"] = now()
    args.out.mkdir(parents=True, exist_ok=True)
    save(data, args.out / f"{data['started'][:10]}-cpu-savings.json")


if __name__ == "__main__":
    main()
