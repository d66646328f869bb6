"""Whole models against eager PyTorch: a forward, sampling with guidance, a training step.

Contenders: the published network as plain PyTorch ("eager"), that with torch.compile on each block,
that after `tim_kernels.accelerate`, its loop and loss still eager, and "tim", which also has the
fused sampler and objective. As for ops, a time is written only beside right answers: outputs are
held against the eager network in float32, with the error of eager bfloat16 as the yardstick.
"""

import copy
import functools
import gc
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tests.eager import EagerTiM
from tests.kernels.parity import DERIVATIVE, FLOOR, FORWARD
from tim_kernels import accelerate
from tim_kernels.dispatch import backend

from .contenders import COMPILE, EAGER, FUSED
from .counting import RULE, total
from .machine import Limits, energy, exact_float32
from .ops import WrongAnswer, rows
from .results import ratios
from .shapes import Model
from .tasks import Case, Contender, Problem, Task, run_once, training_step
from .timing import is_cuda, measure_round, prepare, side_stream, storage_bytes, synchronise

CHECKED = 2  # samples whose answers are compared, and weights whose gradients are
CHECKED_WEIGHTS = "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "final_layer.linear.weight"
EXACT = 1e-2  # relative, of gradients in float32 through a difference over 2ε
MAX_AUTOTUNE = "torch.compile, max-autotune"


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
    if task.derivative == "jvp":
        left_out[COMPILE] = "under torch.func.jvp it runs a compiled function as it was"
    elif is_cuda(device) or task.kind == "forward":  # last: compiling can take the time of the rest
        here.append(Contender(COMPILE, _compile_blocks))
    else:
        left_out[COMPILE] = "on a CPU only a forward is compiled: it takes seconds for each shape"
    return here, left_out


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
        task = self.case.task
        with contender.active(), side_stream(self.device):
            network = self.problem.network_for(contender)
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
        return row | self._roofline(timing.ms)

    def try_once(self, contender: Contender) -> None:
        """Run it, once its answers are seen to be right.

        Raises:
            WrongAnswer: what it computes is off.
        """
        with contender.active(), side_stream(self.device):
            network = self.problem.network_for(contender)
            self._check(contender, network)
            self._runner(contender, network)()

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
        """TFLOP/s, and the share of what the fused network's launches take at measured limits."""
        work = [
            (times, total(_forward_work(self.case.model, batch), self.limits))
            for times, batch in self.problem.forwards()
        ]
        flops, seconds = (
            sum(n * getattr(forward, of) for n, forward in work) for of in ("flops", "seconds")
        )
        return {
            "tflop_per_s": flops / ms / 1e9,
            "roofline_ms": 1e3 * seconds,
            "share_of_limit": 1e3 * seconds / ms,
            "bytes": sum(n * forward.bytes for n, forward in work),
            "flops": flops,
            "counted": f"the network's forwards, a backward as two, a tangent as one: {RULE}",
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
        gc.collect()  # a method that is replaced on its instance is a cycle
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
