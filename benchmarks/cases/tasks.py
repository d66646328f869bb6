"""What is done with a whole model: a forward, sampling with guidance, a training step; the network
with noise for weights and the inputs on which it is done; and whose loop and loss run it."""

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.eager import EagerTiM

from ..clock.timing import is_cuda
from . import published
from .shapes import Model

CFG_SCALE = 1.5
STEPS = (1, 4, 8)
OBJECTIVE = dict(weight_time_type="sqrt", weight_time_tangent=True)  # the published one


class Task(NamedTuple):
    """`kind` is forward, sampling or training; `steps` of sampling, `derivative` of training."""

    kind: str
    steps: int = 0
    derivative: str = ""
    graph: bool = False

    @property
    def title(self) -> str:
        if self.kind == "sampling":
            return f"sampling, {self.steps} guided step{'s' * (self.steps > 1)}"
        if self.kind == "training":
            return f"training step, {self.derivative}"
        return "forward, CUDA graph" if self.graph else "forward"


FORWARD_TASK, GRAPH_TASK = Task("forward"), Task("forward", graph=True)
SAMPLING = tuple(Task("sampling", steps=steps) for steps in STEPS)
TRAINING = Task("training", derivative="dde"), Task("training", derivative="jvp")


class NetworkCase(NamedTuple):
    """`only` are the contenders that run, by what their names begin with; empty, all but
    max-autotune. Training in bfloat16 is autocast over float32 weights."""

    model_name: str
    model: Model
    batch: int
    task: Task
    only: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16

    @property
    def title(self) -> str:
        return f"{self.task.title}, {self.model_name}, batch {self.batch}"


@torch.no_grad()
def fill_with_noise(network: nn.Module) -> nn.Module:
    """Weights that keep the size of what passes through and gates of size one half, so that a
    mistake in any block is seen in the output."""
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("norm.weight"):
            parameter.normal_(1, 0.1)
        else:
            parameter.normal_(std=0.5 if "adaLN_modulation.fc2" in name else 0.1)
    return network


class Problem:
    """A network with noise for weights and inputs; for training its weights are float32."""

    def __init__(self, case: NetworkCase, device: str):
        self.case, self.device = case, device
        self.is_training = case.task.kind == "training"
        params = case.model.network_params()
        torch.manual_seed(0)
        with torch.device(device):
            self.network = fill_with_noise(EagerTiM(**params))
            self.x = torch.randn(case.batch, *case.model.latent)
            self.z = torch.randn_like(self.x)
            self.t = torch.rand(case.batch) * 0.8 + 0.1
            self.r = self.t * torch.rand(case.batch)
            if case.model.text_tokens:
                shape = case.batch, case.model.text_tokens, params["cap_feat_dim"]
                self.y, self.y_null = torch.randn(2, *shape)
            else:
                self.y = torch.randint(params["num_classes"], (case.batch,))
                self.y_null = torch.full_like(self.y, params["num_classes"])
        self.n_diffusion = case.batch // 2
        self.r[: self.n_diffusion] = self.t[: self.n_diffusion]

    def copy_of_network(self) -> nn.Module:
        network = copy.deepcopy(self.network)
        return network if self.is_training else network.to(self.case.dtype).requires_grad_(False)

    def forwards(self) -> list[tuple[int, int]]:
        """(how many, of what batch): the task's network evaluations, and its gradients and
        tangents in multiples of them."""
        task, batch = self.case.task, self.case.batch
        if task.kind == "sampling":
            return [(task.steps, 2 * batch)]  # with guidance
        if task.kind == "training":
            return [(3, batch), (2, batch - self.n_diffusion)]
        return [(1, batch)]

    def picked(self, samples: int) -> list[int]:
        """The first of them has r = t, the last has not; one of a batch of one."""
        return sorted({0, self.case.batch - 1})[:samples]

    def inputs(self, samples: int | None = None) -> dict[str, Tensor]:
        """x, z, t, r, y, y_null of all, or of that many samples."""
        picked = slice(None) if samples is None else self.picked(samples)
        tensors = {name: getattr(self, name)[picked] for name in ("x", "z", "t", "r", "y")}
        tensors["y_null"] = self.y_null[picked]
        if not self.is_training and tensors["y"].is_floating_point():
            tensors |= {name: tensors[name].to(self.case.dtype) for name in ("y", "y_null")}
        return tensors


def run_once(task: Task, network: nn.Module, inputs: dict, n_diffusion: int, is_tim: bool):
    """The task once: the output, the samples, or the loss; with the published loop and loss, or
    those of `tim`."""
    x, z, t, r, y, y_null = (inputs[name] for name in ("x", "z", "t", "r", "y", "y_null"))
    dtype = next(network.parameters()).dtype
    if task.kind == "forward":
        with torch.no_grad():
            return network(x.to(dtype), t, r, y)
    if task.kind == "sampling":
        if not is_tim:
            return published.sample(network, z, y, y_null, task.steps, CFG_SCALE)
        from tim.sampling import sample

        guidance = dict(cfg_scale=CFG_SCALE, cfg_high=1.1)  # above 1: the first step too
        return sample(network, _transport(), z, y, y_null, num_steps=task.steps, **guidance)
    if is_tim:
        objective = _objective(task.derivative)
        return objective(network, x, z, y, t=t, r=r, n_diffusion=n_diffusion).weighted
    return published.training_loss(network, x, z, y, t, r, n_diffusion, task.derivative)


@functools.cache
def _transport():
    from tim.transports import make

    return make("OT_FM", P_mean=-0.4, P_std=1.0, sigma_d=1.0)


@functools.cache
def _objective(derivative: str):
    from tim.objective import TransitionObjective

    return TransitionObjective(_transport(), derivative_type=derivative, **OBJECTIVE)


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """To bfloat16, but in float32 not at all."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, dtype != torch.float32)


def training_step(loss_of: Callable, network: nn.Module, device: str, dtype) -> Callable:
    """Forward, derivative, loss, backward and AdamW; in bfloat16 by autocast."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=is_cuda(device))

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, dtype):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss

    return step
