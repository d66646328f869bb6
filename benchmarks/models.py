"""Whole models against eager PyTorch: a forward, sampling with guidance, a training step.

Contenders: the published network as plain PyTorch ("eager"), that with torch.compile on each block,
that after `tim_kernels.accelerate`, its loop and loss still eager, and "tim", which also has the
fused sampler and objective. As for ops, a time is written only beside right answers: outputs are
held against the eager network in float32, with the error of eager bfloat16 as the yardstick.
"""

import contextlib
import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.eager import EagerTiM
from tests.tim_kernels.parity import DERIVATIVE, FLOOR, FORWARD
from tim_kernels import accelerate, backend

from . import published
from .contenders import COMPILE, EAGER, FUSED
from .counting import total
from .machine import Limits, energy, exact_float32
from .ops import WrongAnswer, rows
from .results import ratios
from .shapes import Model
from .timing import is_cuda, measure_round, prepare, side_stream, storage_bytes, synchronise

CFG_SCALE = 1.5
STEPS = (1, 4, 8)
CHECKED = 2  # samples whose answers are compared, and weights whose gradients are
CHECKED_WEIGHTS = "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "final_layer.linear.weight"
OBJECTIVE = dict(weight_time_type="sqrt", weight_time_tangent=True)  # the published one
EXACT = 1e-2  # relative, of gradients in float32 through a difference over 2ε
MAX_AUTOTUNE = "torch.compile, max-autotune"


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


class Case(NamedTuple):
    """`only` are the contenders that run, by what their names begin with; empty, all but
    max-autotune."""

    model_name: str
    model: Model
    batch: int
    task: Task
    only: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.task.title}, {self.model_name}, batch {self.batch}"


class Contender(NamedTuple):
    """How a network is prepared, and whose loop and loss run it."""

    name: str
    prepare: Callable[[nn.Module, Model], nn.Module] = lambda network, model: network
    backend: str | None = None
    is_tim: bool = False

    @property
    def is_own(self) -> bool:
        return not self.name.startswith(COMPILE)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        before = backend._process
        backend.set_backend(self.backend or before)
        try:
            yield
        finally:
            backend.set_backend(before)
            if not self.is_own:
                torch._dynamo.reset()


def _compile_blocks(network: nn.Module, model: Model, mode: str | None = None) -> nn.Module:
    for layer in (*network.blocks, network.final_layer):
        layer.compile(dynamic=False, mode=mode)
    return network


def _max_autotune(network: nn.Module, model: Model) -> nn.Module:
    return _compile_blocks(network, model, "max-autotune-no-cudagraphs")


def _accelerate(network: nn.Module, model: Model) -> nn.Module:
    report = accelerate(network)
    if report.fused != [""]:
        raise RuntimeError(f"accelerate left it alone: {report}")
    return network


def _tim(network: nn.Module, model: Model) -> nn.Module:
    from tim.models import TiMTransformer2DModel

    weights = next(network.parameters())
    with torch.device(weights.device):
        ours = TiMTransformer2DModel(**model.network_params())
    ours = ours.bfloat16() if weights.dtype == torch.bfloat16 else ours
    ours.load_state_dict(network.state_dict())
    return ours.requires_grad_(weights.requires_grad)


def contenders(task: Task, device: str) -> tuple[list[Contender], dict[str, str]]:
    """Those that can run the task here, eager first, and why the others can not."""
    here, left_out = [Contender(EAGER)], {}
    backends = FUSED if is_cuda(device) else ("reference",)
    needs = {"forward": ("diffusers",), "sampling": ("diffusers",), "training": ("accelerate",)}
    missing = [name for name in needs[task.kind] if importlib.util.find_spec(name) is None]
    prepare = _accelerate if importlib.util.find_spec("diffusers") is None else _tim
    for name in backends:
        reasons = {op: backend.obstacle(name, op, device) for op in backend.OPS}
        if any(reasons.values()):
            op, reason = next((op, reason) for op, reason in reasons.items() if reason)
            left_out[name] = f"{op}: {reason}"
            continue
        here.append(Contender(f"accelerate, {name}", _accelerate, name))
        if missing:
            left_out[f"tim, {name}"] = f"{', '.join(missing)} is not installed"
        else:
            here.append(Contender(f"tim, {name}", prepare, name, True))
    if is_cuda(device) or task.kind == "forward":  # last: compiling can take the time of all others
        here.append(Contender(COMPILE, _compile_blocks))
    else:
        left_out[COMPILE] = "on a CPU only a forward is compiled: it takes seconds for each shape"
    return here, left_out


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
    """A network with noise for weights and inputs; float32 weights and autocast for training."""

    def __init__(self, case: Case, device: str):
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

    def network_for(self, contender: Contender) -> nn.Module:
        network = copy.deepcopy(self.network)
        if not self.is_training:
            network = network.bfloat16().requires_grad_(False)
        return contender.prepare(network, self.case.model)

    def picked(self, samples: int) -> list[int]:
        """The first of them has r = t, the last has not; one of a batch of one."""
        return sorted({0, self.case.batch - 1})[:samples]

    def inputs(self, samples: int | None = None) -> dict[str, Tensor]:
        """x, z, t, r, y, y_null of all, or of that many samples."""
        picked = slice(None) if samples is None else self.picked(samples)
        tensors = {name: getattr(self, name)[picked] for name in ("x", "z", "t", "r", "y")}
        tensors["y_null"] = self.y_null[picked]
        if not self.is_training and tensors["y"].is_floating_point():
            tensors |= {name: tensors[name].bfloat16() for name in ("y", "y_null")}
        return tensors


def run_once(contender: Contender, task: Task, network: nn.Module, inputs: dict, n_diffusion: int):
    """The task once: the output, the samples, or the loss."""
    x, z, t, r, y, y_null = (inputs[name] for name in ("x", "z", "t", "r", "y", "y_null"))
    dtype = next(network.parameters()).dtype
    if task.kind == "forward":
        with torch.no_grad():
            return network(x.to(dtype), t, r, y)
    if task.kind == "sampling":
        if not contender.is_tim:
            return published.sample(network, z, y, y_null, task.steps, CFG_SCALE)
        from tim.sampling import sample

        guidance = dict(cfg_scale=CFG_SCALE, cfg_high=1.1)  # above 1: the first step too
        return sample(network, _transport(), z, y, y_null, num_steps=task.steps, **guidance)
    if contender.is_tim:
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


def training_step(loss_of: Callable, network: nn.Module, device: str) -> Callable:
    """Forward, derivative, loss, backward and AdamW, in bfloat16 autocast over float32 weights."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=is_cuda(device))

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss

    return step


class Comparison:
    """The contenders of one case, one after the other."""

    def __init__(self, case: Case, device: str, limits: Limits):
        self.case, self.device, self.limits = case, device, limits
        self.problem = Problem(case, device)
        everyone, self.left_out = contenders(case.task, device)
        self.eager = everyone[0]
        self.contenders = [c for c in everyone if not case.only or c.name.startswith(case.only)]
        if MAX_AUTOTUNE in case.only:
            self.contenders = [Contender(MAX_AUTOTUNE, _max_autotune)]

    def row(self, contender: Contender, seconds: float = 0.5) -> dict:
        """Check, then time.

        Raises:
            WrongAnswer: what it computes is off.
        """
        task, problem = self.case.task, self.problem
        with contender.active(), side_stream(self.device):
            network = problem.network_for(contender)
            error = self._check(contender, network)
            run = self._runner(contender, network)
            run()
            peak = self._peak_memory(run)
            one_round, how = prepare([run], self.device, graph=task.graph)
            timing = measure_round(one_round, how, 1, seconds)
            joules, method = self._energy(one_round, timing.ms)
        row = {
            "kind": "model",
            "model": self.case.model_name,
            "batch": self.case.batch,
            "task": task.title,
            "contender": contender.name,
            "dtype": "bfloat16 autocast" if task.kind == "training" else "bfloat16",
            "ms": timing.ms,
            "ms_10": timing.low,
            "ms_90": timing.high,
            "timed": f"{timing.method}, {timing.rounds} rounds",
            "samples_per_s": self.case.batch / timing.ms * 1e3,
            "peak_gib": peak,
            "joules_per_image": None if joules is None else joules / self.case.batch,
            "energy": method,
            "error_vs_eager": error,
        }
        return row | (self._roofline(timing.ms) if task.kind == "forward" else {})

    def synchronised(self, contender: Contender) -> Callable:
        """The task on a network of its own, to the end of its work."""
        run = self._runner(contender, self.problem.network_for(contender))
        return lambda: (run(), synchronise(self.device))

    def _runner(self, contender: Contender, network: nn.Module) -> Callable:
        task, problem = self.case.task, self.problem
        run = functools.partial(
            run_once, contender, task, network, problem.inputs(), problem.n_diffusion
        )
        return training_step(run, network, self.device) if task.kind == "training" else run

    def _roofline(self, ms: float) -> dict:
        """TFLOP/s, and the share of what the fused model's launches take at measured limits."""
        work = total(_forward_work(self.case.model, self.case.batch), self.limits)
        return {
            "tflop_per_s": work.flops / ms / 1e9,
            "roofline_ms": 1e3 * work.seconds,
            "share_of_limit": 1e3 * work.seconds / ms,
            "bytes": work.bytes,
            "flops": work.flops,
        }

    def _check(self, contender: Contender, network: nn.Module) -> float:
        """The error on a few samples, as a share of eager bfloat16's."""
        problem, eager = self.problem, self.eager
        if not hasattr(self, "_truth"):
            with exact_float32():
                self._truth = self._answer(eager, copy.deepcopy(problem.network), exact=True)
            plain = self._answer(eager, problem.network_for(eager))
            self._yardstick = float((plain - self._truth).norm())
        if problem.is_training and contender.is_own:
            self._check_exactly(contender, network)
        error = float((self._answer(contender, network) - self._truth).norm())
        factor = FORWARD if self.case.task.kind == "forward" else DERIVATIVE
        allowed = factor * self._yardstick + FLOOR * float(self._truth.norm())
        if not error <= allowed:
            raise WrongAnswer(
                f"{contender.name} in {self.case.title}: error {error:.3e} > {allowed:.3e}"
            )
        return error / max(self._yardstick, 1e-300)

    def _check_exactly(self, contender: Contender, network: nn.Module) -> None:
        """In float32: a difference of bfloat16 networks over 2ε is too noisy to show mistakes."""
        with exact_float32():
            answer = self._answer(contender, network, exact=True)
        error = float((answer - self._truth).norm() / self._truth.norm())
        if not error <= EXACT:
            raise WrongAnswer(
                f"{contender.name} in {self.case.title}, float32: error {error:.1e} > {EXACT:.0e}"
            )

    def _answer(self, contender: Contender, network: nn.Module, exact: bool = False) -> Tensor:
        """What the task gives for a few samples; of a training step, some gradients.

        Float32 runs those samples alone, and so does every training step; the others run the whole
        batch, whose shapes torch.compile will be timed with.
        """
        task, problem = self.case.task, self.problem
        is_alone = exact or problem.is_training
        inputs = problem.inputs(CHECKED if is_alone else None)
        n_diffusion = 1 if is_alone else problem.n_diffusion
        if exact:
            inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=problem.is_training and not exact):
            out = run_once(contender, task, network, inputs, n_diffusion)
        if not problem.is_training:
            return (out if is_alone else out[problem.picked(CHECKED)]).float()
        # the loss divides by itself, so its value says nothing: its gradients do
        weights = [network.get_parameter(name) for name in CHECKED_WEIGHTS]
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(out, weights)])

    def _peak_memory(self, run: Callable) -> float | None:
        if not is_cuda(self.device):
            return None
        synchronise(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        synchronise(self.device)
        spare = storage_bytes(list(self.problem.network.parameters()))  # each has a copy of its own
        return (torch.cuda.max_memory_allocated(self.device) - spare) / 2**30

    def _energy(self, run: Callable, ms: float) -> tuple[float | None, str]:
        """Joules of one run, over at least a second and a half of them."""
        if not is_cuda(self.device):
            return None, "not measured: no GPU"
        runs = max(1, round(1500 / ms))
        with energy(self.device) as used:
            for _ in range(runs):
                run()
        return None if used.joules is None else used.joules / runs, used.method


@functools.cache
def _forward_work(model: Model, batch: int):
    """The launches of the fused forward, counted on meta tensors."""
    from .counting import count

    with torch.device("meta"):
        network = EagerTiM(**model.network_params()).bfloat16()
        x = torch.empty(batch, *model.latent, dtype=torch.bfloat16)
        t, r = torch.empty(2, batch)
        if model.text_tokens:
            y = torch.empty(batch, model.text_tokens, network.y_embedder.norm.weight.shape[0])
            y = y.bfloat16()
        else:
            y = torch.empty(batch, dtype=torch.long)
    _accelerate(network, model)
    from tim_kernels import use_backend

    with use_backend("triton"), torch.no_grad():
        return count(network, x, t, r, y)


def compare(case: Case, device: str, limits: Limits, seconds: float = 0.5) -> Iterator[dict]:
    """A row for each contender, or in its place why there is none; as `ops.compare`."""
    yield from rows(Comparison(case, device, limits), case.title, seconds)


def summary(row: dict) -> str:
    """One line for people."""
    return (
        f"{row['model']:<20}{row['batch']:>5}  {row['task']:<28}{row['contender']:<28}"
        f"{row['ms']:>10.2f} ms{row['samples_per_s']:>10.1f} images/s{ratios(row)}"
    )
