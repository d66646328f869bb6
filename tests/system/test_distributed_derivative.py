"""Two processes, by DistributedDataParallel and FSDP2: every rank gets the mean of both ranks'
gradients, whatever gives dF/dt."""

import datetime
import itertools
import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.eager import EagerTiM, randomise
from tim.models import TiMTransformer2DModel
from tim.objective import TransitionObjective
from tim.transports import make
from tim_kernels import accelerate

RANKS = 2
FSDP2_KNOWS_JVP = torch.__version__ >= (2, 13)  # github.com/pytorch/pytorch/issues/182641
KINDS = {
    "dde": dict(derivative_type="dde"),
    "jvp": dict(derivative_type="jvp"),
    "jvp shared": dict(derivative_type="jvp", share_primal=True),
}
ACCELERATED = "accelerated"  # somebody else's model, with a loss of its own
CASES = [
    (wrapper, condition, kind, checkpointing)
    for wrapper, condition in (("ddp", "class"), ("fsdp2", "class"), ("fsdp2", "text"))
    for kind, checkpointing in itertools.product((*KINDS, ACCELERATED), (False, True))
]


def can_run(wrapper: str, kind: str) -> bool:
    return FSDP2_KNOWS_JVP or wrapper != "fsdp2" or "jvp" not in kind


def problem(rank: int, condition: str, kind: str, checkpointing: bool = False):
    is_text, is_accelerated = condition == "text", kind == ACCELERATED
    model = randomise(
        (EagerTiM if is_accelerated else TiMTransformer2DModel)(
            patch_size=1, in_channels=3, hidden_size=16, encoder_depth=1, depth=2, num_heads=2,
            num_classes=4, z_dim=6, projector_dim=8, lora_hidden_size=8,
            cap_feat_dim=5 if is_text else None,
        )
    )  # fmt: skip
    if is_accelerated:
        assert accelerate(model).fused == [""]
        model.use_checkpoint = checkpointing
    elif checkpointing:
        model.enable_gradient_checkpointing()
    g = torch.Generator().manual_seed(rank)
    x, z = torch.randn(2, 4, 3, 2, 2, generator=g)
    t = torch.rand(4, generator=g) * 0.5 + 0.3
    r = torch.where(torch.arange(4) < 2, t, t / 2)
    features = torch.randn(4, 4, 6, generator=g)
    y = torch.randn(4, 3, 5, generator=g) if is_text else torch.arange(4)
    return model, (x, z, y, features), t, r


def backward(model, batch, t, r, kind):
    if kind == ACCELERATED:
        x, _, y, features = batch
        sample, zs = model(x, t, r, y, return_zs=True)
        return ((sample - x).square().mean() + (zs - features).square().mean()).backward()
    objective = TransitionObjective(make("OT_FM"), **KINDS[kind])
    loss = objective(model, *batch, t=t, r=r, n_diffusion=2)
    (loss.weighted + loss.projection).backward()


def gradients(model) -> torch.Tensor:
    whole = (getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters())
    return torch.cat([gradient.flatten() for gradient in whole if gradient is not None])


def wrap(model, wrapper: str, mesh):
    if wrapper == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def work(rank: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(minutes=2),
    )  # fmt: skip
    found, mesh = {}, init_device_mesh("cpu", (RANKS,))
    for case in CASES:
        wrapper, condition, kind, checkpointing = case
        if not can_run(wrapper, kind):
            continue
        model, batch, t, r = problem(rank, condition, kind, checkpointing)
        wrapped = wrap(model, wrapper, mesh)
        for _ in range(2):  # a second step would hang or raise if the first left something behind
            wrapped.zero_grad()
            backward(wrapped, batch, t, r, kind)
        found[case] = gradients(model)
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


@pytest.fixture(scope="module")
def alone():
    """Each rank's gradients without the other, by condition and kind."""
    found = {}
    for condition, kind in itertools.product(("class", "text"), (*KINDS, ACCELERATED)):
        for rank in range(RANKS):
            model, batch, t, r = problem(rank, condition, kind)
            backward(model, batch, t, r, kind)
            found.setdefault((condition, kind), []).append(gradients(model))
    return found


@pytest.mark.parametrize("wrapper, condition, kind, checkpointing", CASES)
def test_gradients_are_equal_and_the_mean(ranks, alone, wrapper, condition, kind, checkpointing):
    if not can_run(wrapper, kind):
        pytest.skip(f"FSDP2 has no forward mode in torch {torch.__version__}: 2.13 has it")
    first, second = (found[wrapper, condition, kind, checkpointing] for found in ranks)
    assert torch.equal(first, second)
    one, other = alone[condition, kind]
    mean = (one + other) / RANKS
    assert not torch.allclose(one, other, rtol=0.1)
    assert (first - mean).norm() < 1e-5 * mean.norm()
