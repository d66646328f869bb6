"""How a fused op enters PyTorch: one schema, a fake kernel, gradients, and no silent tangents.

`torch.func.jvp` through a custom operator gives a zero tangent without an error, because the
operator's autograd kernel sees no tensor that requires grad; and torch.compile cannot trace an
`autograd.Function` with a `jvp`. So an op has two faces: the operator of torch.ops, which
torch.compile sees, which has a backward and refuses a live tangent; and the `Operator` here, which
eager code calls. It plans a call once for each signature and then goes straight to the launcher,
through an `autograd.Function` with backward and jvp where something can be differentiated.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import Op, choose, fused, plan, requested, use_backend
from .plans import Plans, signature
from .torch_private import (
    apply_function,
    below_autograd,
    dispatch_modes,
    has_tangent,
    is_forward_mode,
    is_forward_mode_enabled,
    is_functorch_active,
)

NAMESPACE = __package__.partition(".")[0]  # another copy of this package has another
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
NO_TANGENT = (
    f"{NAMESPACE}::{{}} has no forward derivative inside torch.compile or as a bare operator: "
    f"call the public function of {NAMESPACE} in eager mode"
)
OPERATORS: dict[str, "Operator"] = {}  # by name


class Planned(NamedTuple):
    """A call of an operator with arguments of one signature, once they are checked."""

    call: Callable  # derivatives and all
    run: Callable | None  # what computes it; None where the reference does


class Operator:
    """One operator, `schema`; `fake` gives the outputs' shapes. Its launchers are those that bear
    the rest of its name in `op`'s folder: `swiglu_backward` of swiglu is `backward`.

    It has no derivative until `differentiable` adds one, and raises when asked for it: a tangent
    that depends on weights may be used as a constant, not differentiated.
    """

    def __init__(self, op: Op, schema: str, fake: Callable):
        self.op, self.name = op, schema.partition("(")[0]
        self.launcher = self.name.removeprefix(op.name).strip("_") or "forward"
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(self.name, self._run, device)
        LIBRARY.impl(self.name, self._autograd, "Autograd", with_keyset=True)
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=LIBRARY)
        self.torch_op = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self.check = self.reference = self.on_cpu = self.derivative = None
        self.plans, self.calls = Plans(), Plans()
        OPERATORS[self.name] = self

    def differentiable(
        self,
        check: Callable,
        reference: Callable | None,
        setup_context: Callable,
        backward: Callable,
        jvp: Callable,
        on_cpu: Callable | None = None,
    ) -> "Operator":
        """Give it derivatives, which are those of an `autograd.Function`, where a gradient or
        tangent that does not exist is None; what checks its arguments, says whether one is float64
        and so has no kernel; and the definition, with perhaps a faster form of it on a CPU."""
        self.check, self.reference = check, reference
        self.on_cpu = on_cpu or reference
        self.derivative = Derivative(self.name, setup_context, backward, jvp)
        return self

    def __call__(self, *args):
        if torch.compiler.is_compiling():
            return self._traced(args)
        return self.planned(args).call(*args)

    def planned(self, args: tuple) -> Planned:
        """What `__call__` does with arguments like these."""
        key = requested(), signature(args)
        try:
            planned = self.calls.get(key)
        except TypeError:  # sizes that are symbols, while something is traced, have no hash
            return self._plan(args)
        if planned is None:
            planned = self.calls[key] = self._plan(args)
        return planned

    def _plan(self, args: tuple) -> Planned:
        is_real = all(type(x) in (Tensor, torch.nn.Parameter) for x in args if _is_tensor(x))
        if self._is_reference(args, is_real):
            is_cpu = requested() == "auto" and _first_tensor(args).device.type == "cpu"
            return Planned(self.on_cpu if is_cpu and is_real else self.reference, None)
        launch, torch_op, derivative = self.torch_op, self.torch_op, self.derivative
        if is_real and _first_tensor(args).device.type in ("cpu", "cuda"):
            launch = self._launch(args)

        def run(*args):
            return torch_op(*args) if dispatch_modes() else launch(*args)

        if derivative is not None:
            return Planned(partial(derivative, run), run)

        def call(*args):
            return torch_op(*args) if can_differentiate(args) else run(*args)

        return Planned(call, run)

    def _is_reference(self, args: tuple, is_real: bool) -> bool:
        """Whether the definition runs: it was chosen, or a tensor is float64, for which no kernel
        is made. The arguments are checked on the way."""
        if self.check is None:
            return False
        is_double = self.check(*args)
        device = _first_tensor(args).device.type
        is_chosen = choose(self.op.name, device, is_real and device != "meta") == "reference"
        return self.reference is not None and (is_double or is_chosen)

    def _traced(self, args: tuple):
        """The call as torch.compile sees it."""
        if self._is_reference(args, False):
            return self.reference(*args)
        if has_tangent(args):
            raise NotImplementedError(NO_TANGENT.format(self.name))
        return self.torch_op(*args)

    def _launch(self, args: tuple) -> Callable:
        """The launcher for arguments like these, with their device current."""
        tensor = _first_tensor(args)
        launch = plan(self.op, self.launcher, args, fused(self.op, tensor))
        device = tensor.device
        if device.type != "cuda" or torch.cuda.device_count() == 1:
            return launch

        def on_its_device(*args):
            with torch.cuda.device(device):
                return launch(*args)

        return on_its_device

    def _run(self, *args):
        key = requested(), signature(args)
        launch = self.plans.get(key)
        if launch is None:
            launch = self.plans[key] = self._launch(args)
        return launch(*args)

    def _autograd(self, keyset, *args):
        if is_forward_mode_enabled() and has_tangent(args):
            raise NotImplementedError(NO_TANGENT.format(self.name))
        run = partial(below_autograd, self.torch_op, keyset)
        if not torch.is_grad_enabled() or not _requires_grad(args):
            return run(*args)
        if self.derivative is None:
            constants = (x.detach() if _is_tensor(x) else x for x in args)
            return _Constant.apply(self.name, run, torch.empty(0, requires_grad=True), *constants)
        return self.derivative.function.apply(run, *args)


class Derivative:
    """The derivatives of what computes an op, as `Operator.differentiable` takes them:
    `derivative(run, *args)` is run(*args), differentiable where somebody may ask for it."""

    def __init__(self, name: str, setup_context: Callable, backward: Callable, jvp: Callable):
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(run, *args):
                return run(*args)

            @staticmethod
            def setup_context(ctx, inputs, output):
                ctx.set_materialize_grads(False)
                ctx.backend = requested()  # a choice is a thread's, and autograd has its own
                setup_context(ctx, inputs[1:], output)

            @staticmethod
            @once_differentiable
            def backward(ctx, *gradients):
                with use_backend(ctx.backend):
                    return None, *backward(ctx, *gradients)

            @staticmethod
            def jvp(ctx, _, *tangents):
                return jvp(ctx, *tangents)

        Function.__name__ = Function.__qualname__ = name
        self.function, self.apply = Function, apply_function(Function)

    def __call__(self, run: Callable, *args):
        if is_functorch_active():
            return self.function.apply(run, *args)
        return self.apply(run, *args) if can_differentiate(args) else run(*args)


def can_differentiate(args: tuple) -> bool:
    """Whether anybody may ask for a derivative in some tensor of `args`. Where nobody can, as in
    sampling, an `autograd.Function` would be most of what a call costs on the host."""
    if is_forward_mode() or is_functorch_active():
        return True
    return torch.is_grad_enabled() and _requires_grad(args)


def _requires_grad(args: tuple) -> bool:
    for x in args:  # noqa: SIM110, a loop is faster than `any` of a generator
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def _is_tensor(x) -> bool:
    return isinstance(x, Tensor)


def _first_tensor(args: tuple) -> Tensor:
    for x in args:
        if isinstance(x, Tensor):
            return x
    raise ValueError("an operator needs a tensor, got none")


class _Constant(torch.autograd.Function):
    """An output that raises when differentiated. Its graph ends here, so that a tangent does not
    keep alive what it was made of."""

    @staticmethod
    def forward(name, run, end, *args):
        return run(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(f"{NAMESPACE}::{ctx.name} has no derivative: it is one itself")
