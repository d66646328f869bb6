"""Two processes: every rank gets the mean of both ranks' gradients, whatever gives dF/dt."""

import datetime
import itertools
import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.eager import randomise
from tim.models import TiMTransformer2DModel
from tim.objective import TransitionObjective
from tim.transports import make

RANKS = 2
KINDS = {
    "dde": dict(derivative_type="dde"),
    "jvp": dict(derivative_type="jvp"),
    "jvp shared": dict(derivative_type="jvp", share_primal=True),
}
CASES = list(itertools.product(KINDS, (False, True)))


def problem(rank: int):
    model = randomise(
        TiMTransformer2DModel(
            patch_size=1, in_channels=3, hidden_size=16, encoder_depth=1, depth=2, num_heads=2,
            num_classes=4, z_dim=6, projector_dim=8, lora_hidden_size=8,
        )
    )  # fmt: skip
    g = torch.Generator().manual_seed(rank)
    x, z = torch.randn(2, 4, 3, 2, 2, generator=g)
    t = torch.rand(4, generator=g) * 0.5 + 0.3
    r = torch.where(torch.arange(4) < 2, t, t / 2)
    return model, (x, z, torch.arange(4), torch.randn(4, 4, 6, generator=g)), t, r


def backward(model, batch, t, r, kind):
    objective = TransitionObjective(make("OT_FM"), **KINDS[kind])
    loss = objective(model, *batch, t=t, r=r, n_diffusion=2)
    (loss.weighted + loss.projection).backward()


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def work(rank: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(minutes=2),
    )  # fmt: skip
    found = {}
    for kind, checkpointing in CASES:
        model, batch, t, r = problem(rank)
        if checkpointing:
            model.enable_gradient_checkpointing()
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
        for _ in range(2):  # a second step would hang or raise if the first left something behind
            wrapped.zero_grad()
            backward(wrapped, batch, t, r, kind)
        found[kind, checkpointing] = gradients(model)
    torch.save(found, f"{folder}/{rank}.unfinished")
    os.rename(f"{folder}/{rank}.unfinished", f"{folder}/{rank}.pt")
    while not all(os.path.exists(f"{folder}/{other}.pt") for other in range(RANKS)):
        time.sleep(0.05)
    os._exit(0)  # without gloo's teardown, which can wait for ever for a rank that is gone


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(work, (folder,), nprocs=RANKS)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("kind, checkpointing", CASES)
def test_gradients_are_equal_and_the_mean(ranks, kind, checkpointing):
    first, second = (found[kind, checkpointing] for found in ranks)
    assert torch.equal(first, second)
    alone = []
    for rank in range(RANKS):
        model, batch, t, r = problem(rank)
        backward(model, batch, t, r, kind)
        alone.append(gradients(model))
    mean = sum(alone) / RANKS
    assert not torch.allclose(alone[0], alone[1], rtol=0.1)
    assert (first - mean).norm() < 1e-5 * mean.norm()
