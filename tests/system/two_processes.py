"""Two processes (gloo) beside the one that tests."""

import os
import signal
import socket
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from tqdm import tqdm

from tim.training import loop

RANKS = 2


def whole(tensor):
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()


def state_of(trainer):
    """Everything that a checkpoint has, whole, by name."""
    state = trainer.state
    moments = get_optimizer_state_dict(state.network, state.optimizer)["state"]
    return {
        **{f"network.{n}": whole(p) for n, p in state.network.named_parameters()},
        **{f"ema.{n}": whole(p) for n, p in state.average.network.named_parameters()},
        **{f"{kind}.{n}": whole(v) for n, m in moments.items() for kind, v in m.items()},
        "counts": torch.tensor([state.step, state.images, state.micro_steps, state.average.step]),
    }


class Captured(Exception):
    pass


def gradients(cfg, parts, output):
    """The network at the start, and the gradients of its first step as clipping gets them."""
    trainer = loop.Trainer(cfg, output, parts)
    start = {name: whole(p) for name, p in trainer.state.network.named_parameters()}
    trainer._window = loop.Window(trainer.device)
    found = {}

    def capture(network, most):
        named = network.named_parameters()
        found.update({n: whole(p.grad) for n, p in named if p.grad is not None})
        raise Captured

    own, loop.clip_gradients = loop.clip_gradients, capture
    try:
        trainer._train_step(iter(trainer._loader()))
    except Captured:
        return start, found
    finally:
        loop.clip_gradients = own


def gradients_of_one(cfg, parts, output):
    """The same in one process, of the micro-batches and draws of both."""
    accumulation = cfg.training.gradient_accumulation_steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Accelerator, "num_processes", RANKS)
        patch.setattr(loop.Parallel, "wrap", lambda self, network: network)
        trainer = loop.Trainer(cfg, output, parts)
        trainer._window, network = loop.Window(trainer.device), trainer.state.network
        start = {name: p.detach().clone() for name, p in network.named_parameters()}
        for trainer.rank in range(RANKS):
            batches = iter(trainer._loader())
            for micro in range(accumulation):
                batch = next(batches)
                loss, _ = trainer._loss(batch, trainer._seen(micro))
                (loss / trainer._batches_per_step(batch) / RANKS).backward()
    return start, {name: p.grad for name, p in network.named_parameters()}


def in_two_processes(folder: Path, function) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(RANKS):
        if (pid := os.fork()) == 0:
            status = 1
            try:
                tqdm.set_lock(threading.RLock())  # its own is shared with the parent
                torch.set_num_threads(1)
                for kind in (AcceleratorState, PartialState, GradientState):
                    kind._shared_state.clear()
                os.environ |= {
                    "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{RANKS}",
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}",
                    "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
                }  # fmt: skip
                function(rank, folder)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(pid)
    deadline, waiting = time.monotonic() + 240, set(children)
    while waiting:
        for pid in sorted(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                waiting.remove(pid)
            if status or time.monotonic() > deadline:  # the other would wait for it
                for other in waiting:
                    os.kill(other, signal.SIGKILL)
        time.sleep(0.02)
    assert (folder / "found.pt").is_file()


def error(one, other):
    """‖one − other‖ / ‖other‖ over all tensors."""
    assert one.keys() == other.keys()
    difference = sum((one[n] - other[n]).double().square().sum() for n in one)
    return float((difference / sum(other[n].double().square().sum() for n in other)).sqrt())


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
