"""How a fused op enters PyTorch: one schema, a fake kernel, gradients, and no silent tangents.

`torch.func.jvp` through a custom operator gives a zero tangent without an error, because the
operator's autograd kernel sees no tensor that requires grad; and torch.compile cannot trace an
`autograd.Function` with a `jvp`. So an op has two faces: the operator of torch.ops, which
torch.compile sees, which has a backward and refuses a live tangent; and the `Operator` here, which
eager code calls. It plans a call once for each signature and then goes straight to the launcher,
through an `autograd.Function` with backward and jvp where something can be differentiated.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch.plans import Plans, signature
from .backend import Op, choose, fused, plan, requested, use_backend
from .slices import each_slice
from .torch_private import (
    apply_function,
    below_autograd,
    dispatch_modes,
    has_tangent,
    is_forward_mode,
    is_forward_mode_enabled,
    is_functorch_active,
    is_mapped,
    is_transformed,
)

NAMESPACE = __package__.partition(".")[0]  # another copy of this package has another
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
NO_TANGENT = (
    f"{NAMESPACE}::{{}} has no forward derivative inside torch.compile or as a bare operator: "
    f"call the public function of {NAMESPACE} in eager mode"
)
OPERATORS: dict[str, "Operator"] = {}  # by name


class Planned:
    """What is done with arguments of one signature, once they are checked: `run` computes it, or
    what torch_op and its dispatch do while a dispatch mode looks on. Without `run` the reference,
    `call`, does it all."""

    def __init__(self, args: tuple, call=None, run=None, torch_op=None):
        self.call, self.run, self.torch_op = call, run, torch_op or run
        self.tensors = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
        self.rest = [None if isinstance(x, Tensor) else x for x in args]


class Operator:
    """One operator, `schema`; `fake` gives the outputs' shapes. Its launchers are those that bear
    the rest of its name in `op`'s folder: `swiglu_backward` of swiglu is `backward`.

    It has no derivative until `differentiable` adds one, and raises when asked for it: a tangent
    that depends on weights may be used as a constant, not differentiated.
    """

    def __init__(self, op: Op, schema: str, fake: Callable):
        self.op, self.name, self.schema, self.fake = op, schema.partition("(")[0], schema, fake
        self.launcher = self.name.removeprefix(op.name).strip("_") or "forward"
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(self.name, self._run, device)
        LIBRARY.impl(self.name, self._autograd, "Autograd", with_keyset=True)
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=LIBRARY)
        self.torch_op = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        rule = partial(each_slice, self.torch_op)
        torch.library.register_vmap(f"{NAMESPACE}::{self.name}", rule, lib=LIBRARY)
        self.check = self.reference = self.on_cpu = self.derivative = None
        self.plans, self.calls = Plans(), Plans()
        OPERATORS[self.name] = self

    def differentiable(
        self, inputs: int, check: Callable, reference: Callable, vjp: Callable,
        on_cpu: Callable | None = None,
    ) -> "Operator":  # fmt: skip
        """Make it differentiable in its first `inputs` arguments.

        `vjp(args, needs, *gradients)` gives the gradients of the first arguments; a gradient of an
        output that nobody has is None. Tangents come from a second operator, `<name>_jvp`, which
        takes the arguments and then the inputs' tangents. `check` refuses arguments, or says
        whether one is float64 and so has no kernel; `reference` is the definition, `on_cpu`
        perhaps a faster form of it.
        """
        self.check, self.reference, self.on_cpu = check, reference, on_cpu or reference
        _, arguments, returns = re.fullmatch(r"(\w+)\((.*)\) -> (.*)", self.schema).groups()
        names = [argument.split()[-1] for argument in arguments.split(", ")]
        tangents = ", ".join(f"Tensor? t{name}" for name in names[:inputs])
        fake = self.fake
        self.jvp = Operator(
            self.op, f"{self.name}_jvp({arguments}, {tangents}) -> {returns}",
            lambda *args: fake(*args[: len(names)]),
        )  # fmt: skip
        tangent = lambda args, *tangents: self.jvp(*args, *tangents[:inputs])  # noqa: E731
        self.derivative = Derivative(self.name, self, vjp, tangent)
        return self

    def __call__(self, *args):
        if torch.compiler.is_compiling():
            return self._traced(args)
        return self.planned(args).call(*args)

    def planned(self, args: tuple) -> Planned:
        """What `__call__` does with arguments like these."""
        if is_mapped(args):
            return self._plan(args)  # of slices, which look like the tensors of other calls
        return self.calls.find((requested(), signature(args)), self._plan, args)

    def _plan(self, args: tuple) -> Planned:
        is_real = not is_mapped(args) and all(
            type(x) in (Tensor, torch.nn.Parameter) for x in args if _is_tensor(x)
        )
        if self._is_reference(args, is_real):
            is_cpu = requested() == "auto" and _first_tensor(args).device.type == "cpu"
            return Planned(args, self.on_cpu if is_cpu and is_real else self.reference)
        run, torch_op = self.torch_op, self.torch_op
        if is_real and _first_tensor(args).device.type in ("cpu", "cuda"):
            run = self._launch(args)

        def watched(*args):
            return (torch_op if dispatch_modes() or can_differentiate(args) else run)(*args)

        planned = Planned(args, watched, run, torch_op)
        if self.derivative is not None:
            planned.call = partial(self.derivative, planned)
        return planned

    def _is_reference(self, args: tuple, is_real: bool) -> bool:
        """Whether the definition runs: it was chosen, or a tensor is float64, for which no kernel
        is made. The arguments are checked on the way."""
        if self.check is None:
            return False
        if self.check(*args):
            return True
        device = _first_tensor(args).device.type
        return choose(self.op.name, device, is_real and device != "meta") == "reference"

    def _traced(self, args: tuple):
        """The call as torch.compile sees it."""
        if self._is_reference(args, False):
            return self.reference(*args)
        if has_tangent(args):
            raise NotImplementedError(NO_TANGENT.format(self.name))
        if self.reference is not None and is_transformed():  # torch compiles no Function in there
            return self.reference(*args)
        return self.torch_op(*args)

    def _launch(self, args: tuple) -> Callable:
        """The launcher for arguments like these, with their device current."""
        device = _first_tensor(args).device
        launch = self._launcher(args, device.type)
        if device.type != "cuda" or torch.cuda.device_count() == 1:
            return launch

        def on_its_device(*args):
            with torch.cuda.device(device):
                return launch(*args)

        return on_its_device

    def _launcher(self, args: tuple, device: str) -> Callable:
        return plan(self.op, self.launcher, args, fused(self.op, args, device))

    def _run(self, *args):
        return self.plans.find((requested(), signature(args)), self._launch, args)(*args)

    def _autograd(self, keyset, *args):
        if is_forward_mode_enabled() and has_tangent(args):
            raise NotImplementedError(NO_TANGENT.format(self.name))
        run = partial(below_autograd, self.torch_op, keyset)
        if not torch.is_grad_enabled() or not _requires_grad(args):
            return run(*args)
        if self.derivative is None:
            constants = (x.detach() if _is_tensor(x) else x for x in args)
            return _Constant.apply(self.name, run, torch.empty(0, requires_grad=True), *constants)
        return self.derivative.function.apply(Planned(args, None, run), *args)


class InferenceOperator(Operator):
    """One for inference alone: a call that somebody could differentiate is refused by name."""

    def __init__(self, op: Op, schema: str, fake: Callable, check: Callable, reference: Callable):
        super().__init__(op, schema, fake)
        self.check, self.reference, self.on_cpu = check, reference, reference

    def __call__(self, *args):
        refuse_derivatives(self.name, args)
        return super().__call__(*args)


def refuse_derivatives(name: str, args: tuple) -> None:
    """
    Raises:
        NotImplementedError: somebody could differentiate what `name` makes of these.
    """
    if has_tangent(args) or (torch.is_grad_enabled() and _requires_grad(args)):
        raise NotImplementedError(
            f"{name} has no derivative, and an argument needs one: it is for inference, "
            "under torch.no_grad()"
        )


class Derivative:
    """Derivatives of whatever computes an op: `derivative(planned, *args)` is planned.run(*args),
    differentiable where somebody may ask for it, with `vjp(args, needs, *gradients)` and
    `jvp(args, *tangents)`, a tangent for each argument, None where there is none. torch.func.vmap
    calls `op(*args)` of every slice."""

    def __init__(self, name: str, op: Callable, vjp: Callable, jvp: Callable):
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(planned, *args):
                return (planned.torch_op if dispatch_modes() else planned.run)(*args)

            @staticmethod
            def setup_context(ctx, inputs, output):
                ctx.set_materialize_grads(False)
                ctx.planned = planned = inputs[0]
                ctx.save_for_backward(*[inputs[i + 1] for i in planned.tensors])
                if is_forward_mode():
                    ctx.save_for_forward(*[inputs[i + 1] for i in planned.tensors])
                ctx.backend = requested()  # a choice is a thread's, and autograd has its own

            @staticmethod
            @once_differentiable
            def backward(ctx, *gradients):
                args = _saved(ctx)
                with use_backend(ctx.backend):
                    found = vjp(args, ctx.needs_input_grad[1:], *gradients)
                return None, *found, *(None,) * (len(args) - len(found))

            @staticmethod
            def jvp(ctx, _, *tangents):
                return jvp(_saved(ctx), *tangents)

            @staticmethod
            def vmap(info, in_dims, _, *args):
                return each_slice(op, info, in_dims[1:], *args)

        Function.__name__ = Function.__qualname__ = name
        self.function, self.apply = Function, apply_function(Function)

    def __call__(self, planned: Planned, *args):
        if is_functorch_active():
            return self.function.apply(planned, *args)
        if can_differentiate(args):
            return self.apply(planned, *args)
        return (planned.torch_op if dispatch_modes() else planned.run)(*args)


def _saved(ctx) -> list:
    args = ctx.planned.rest.copy()
    for i, tensor in zip(ctx.planned.tensors, ctx.saved_tensors, strict=True):
        args[i] = tensor
    return args


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
