"""Whole models against eager PyTorch: a forward, sampling with guidance, a training step.

Contenders: the published network as plain PyTorch ("eager"), that with torch.compile on each block,
that after `tim_kernels.accelerate`, its loop and loss still eager, and "tim", which also has the
fused sampler and objective. As for ops, a time is written only beside right answers: outputs are
held against the eager network in float32, with the error of eager bfloat16 as the yardstick.
"""

import functools
import gc
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.eager import EagerTiM
from tests.kernels.parity import DERIVATIVE, FLOOR, FORWARD
from tim_kernels import accelerate, to_fp8, use_backend
from tim_kernels.dispatch import backend
from tim_kernels.linear import choice

from ..cases import fp8
from ..cases.shapes import Model
from ..cases.tasks import NetworkCase, Problem, Task, autocast, run_once, training_step
from ..clock import timing
from ..clock.machine import Limits, exact_float32, joules
from ..clock.timing import is_cuda, side_stream, synchronise
from ..record.rows import COMPILE, EAGER, FP8, FUSED, QUACK, Network
from ..static.counting import RULE, Total, Work, count, total
from .comparison import Comparison, Contender, WrongAnswer, name_of

CHECKED = 2  # samples whose answers are compared, and weights whose gradients are
CHECKED_WEIGHTS = "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "final_layer.linear.weight"
EXACT = {"forward": 1e-4, "sampling": 1e-4, "training": 1e-2}  # relative, in float32; a training
# step's gradients pass through a difference over 2ε
MAX_AUTOTUNE = "torch.compile, max-autotune"
FP8_ROOM = 2.0**4  # times bfloat16's error: four bits fewer


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


def _fp8(network: nn.Module, model: Model) -> nn.Module:
    to_fp8(_accelerate(network, model).eval())
    return network


def _tim(network: nn.Module, model: Model) -> nn.Module:
    from tim.models import TiMTransformer2DModel  # needs diffusers

    weights = next(network.parameters())
    with torch.device(weights.device):
        ours = TiMTransformer2DModel(**model.network_params())
    ours = ours if weights.dtype == torch.float32 else ours.to(weights.dtype)
    ours.load_state_dict(network.state_dict())
    return ours.requires_grad_(weights.requires_grad)


PUBLISHED = Contender(EAGER, lambda network, model: network)
COMPILED = Contender(COMPILE, _compile_blocks, is_own=False)
AUTO = Contender("tim, auto", _tim, "auto", is_tim=True)


def contenders(task: Task, device: str) -> tuple[list[Contender], dict[str, str]]:
    """Those that can run the task here, eager first, and why the others can not."""
    here, left_out = [PUBLISHED], {}
    backends = FUSED if is_cuda(device) else ("reference",)
    needed = "accelerate" if task.kind == "training" else "diffusers"
    is_missing = importlib.util.find_spec(needed) is None
    make = _accelerate if importlib.util.find_spec("diffusers") is None else _tim
    for name in backends:
        reasons = {op: backend.obstacle(name, op, device) for op in backend.OPS}
        if any(reasons.values()):
            op, reason = next((op, reason) for op, reason in reasons.items() if reason)
            left_out[name] = f"{op}: {reason}"
            continue
        here.append(Contender(f"accelerate, {name}", _accelerate, name))
        if is_missing:
            left_out[f"tim, {name}"] = f"{needed} is not installed"
        else:
            here.append(Contender(f"tim, {name}", make, name, is_tim=True))
    if task.kind != "training":
        if reason := fp8.why_not(device):
            left_out[FP8] = reason
        else:
            here.append(Contender(f"{FP8}, {backends[0]}", _fp8, backends[0], room=FP8_ROOM))
    if task.derivative == "jvp":
        left_out[QUACK] = "with tangents products are PyTorch's"
    elif reason := choice.obstacle("quack"):
        left_out[QUACK] = reason
    else:
        here.append(Contender(f"accelerate, {QUACK}", _accelerate, "auto", linear="quack"))
    if task.derivative == "jvp":
        left_out[COMPILE] = "under torch.func.jvp it runs a compiled function as it was"
    elif is_cuda(device) or task.kind == "forward":  # last: compiling can take the time of the rest
        here.append(COMPILED)
    else:
        left_out[COMPILE] = "on a CPU only a forward is compiled: it takes seconds for each shape"
    return here, left_out


class NetworkComparison(Comparison):
    kind = Network
    counted = f"the network's forwards, a backward as two, a tangent as one: {RULE}"

    def __init__(self, case: NetworkCase, device: str, limits: Limits):
        super().__init__(device, limits)
        self.case, self.topic = case, case.title
        self.problem = Problem(case, device)
        everyone, self.left_out = contenders(case.task, device)
        self.contenders = [c for c in everyone if not case.only or c.name.startswith(case.only)]
        if MAX_AUTOTUNE in case.only:
            self.contenders = [Contender(MAX_AUTOTUNE, _max_autotune, is_own=False)]

    def subject(self, contender: Contender) -> nn.Module:
        return contender.make(self.problem.copy_of_network(), self.case.model)

    def call(self, contender: Contender, network: nn.Module) -> Callable:
        task, problem = self.case.task, self.problem
        run = functools.partial(
            run_once, task, network, problem.inputs(), problem.n_diffusion, contender.is_tim
        )
        if problem.is_training:
            return training_step(run, network, self.device, self.case.dtype)
        return run

    def try_once(self, contender: Contender) -> None:
        """With the answers that are checked, whose shapes are others."""
        with contender.active(), side_stream(self.device):
            network = self.subject(contender)
            self.check(contender, network)
            self.call(contender, network)()

    def time(self, contender: Contender, network: nn.Module, seconds: float):
        case = self.case
        run = self.call(contender, network)
        run()
        peak = self._peak_memory(run)
        one_round, how = timing.prepare([run], self.device, graph=case.task.graph)
        taken = timing.measure_round(one_round, how, 1, seconds)
        used = joules(one_round, max(1, round(1500 / taken.ms)), self.device)
        return taken, dict(
            model=case.model_name, batch=case.batch, task=case.task.title,
            dtype=name_of(case.dtype) + " autocast" * self.problem.is_training,
            samples_per_s=case.batch / taken.ms * 1e3, peak_gib=peak,
            joules_per_image=None if used is None else used / case.batch,
        )  # fmt: skip

    @functools.cached_property
    def work(self) -> Total:
        forwards = [
            total(_forward_work(self.case.model, batch) * times, self.limits)
            for times, batch in self.problem.forwards()
        ]
        return Total(*map(sum, zip(*forwards, strict=True)))

    def check(self, contender: Contender, network: nn.Module) -> float:
        """On a few samples, against the eager network in float32.

        A difference of bfloat16 networks over 2ε is too noisy to show mistakes in a training step,
        so our own run it in float32 too.
        """
        kind, is_float32 = self.case.task.kind, self.case.dtype == torch.float32
        truth, eager_error = self._truth
        size = float(truth.norm())
        if self.problem.is_training and contender.is_own:
            with exact_float32():
                error = float((self._answer(contender, network, exact=True) - truth).norm())
            self._bound(f"{contender.name}, float32", error, EXACT[kind] * size)
        error = float((self._answer(contender, network) - truth).norm())
        factor = FORWARD if kind == "forward" else DERIVATIVE
        floor = EXACT[kind] if is_float32 else FLOOR
        self._bound(contender.name, error, contender.room * (factor * eager_error + floor * size))
        return error / max(eager_error, floor * size, 1e-300)

    def _bound(self, who: str, error: float, allowed: float) -> None:
        if not error <= allowed:
            raise WrongAnswer(f"{who} in {self.case.title}: error {error:.3e} > {allowed:.3e}")

    @functools.cached_property
    def _truth(self) -> tuple[Tensor, float]:
        """The eager network's answer in float32, and how far it is off in the case's dtype."""
        with exact_float32():
            truth = self._answer(PUBLISHED, self.problem.network, exact=True)
        plain = self._answer(PUBLISHED, self.subject(PUBLISHED))
        return truth, float((plain - truth).norm())

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
        is_mixed = problem.is_training and not exact
        with autocast(self.device, self.case.dtype if is_mixed else torch.float32):
            out = run_once(task, network, inputs, n_diffusion, contender.is_tim)
        if not problem.is_training:
            return (out if is_alone else out[problem.picked(CHECKED)]).float()
        # the loss divides by itself, so its value says nothing: its gradients do
        weights = [network.get_parameter(name) for name in CHECKED_WEIGHTS]
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(out, weights)])

    def _peak_memory(self, run: Callable) -> float | None:
        if not is_cuda(self.device):
            return None
        synchronise(self.device)
        gc.collect()  # a method that is replaced on its instance is a cycle
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        synchronise(self.device)
        # each contender has a network of its own
        spare = timing.storage_bytes(list(self.problem.network.parameters()))
        return (torch.cuda.max_memory_allocated(self.device) - spare) / 2**30


@functools.cache
def _forward_work(model: Model, batch: int) -> list[Work]:
    """The launches of the fused forward, counted on meta tensors."""
    with torch.device("meta"):
        network = EagerTiM(**model.network_params()).bfloat16()
    _accelerate(network, model)
    inputs = model.meta_inputs(batch, torch.bfloat16)
    with use_backend("triton"), torch.no_grad():
        return count(network, *inputs)
