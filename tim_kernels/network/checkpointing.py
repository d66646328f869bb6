"""Gradient checkpointing of a block, under forward mode too."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from ..dispatch.backend import requested, use_backend
from ..dispatch.torch_private import is_forward_mode


def checkpointed(checkpoint: Callable, function: Callable, block: nn.Module, *args):
    """function(block, *args), whose activations `checkpoint`, such as PyTorch's, makes again in
    backward.

    Called inside the block's forward: what hangs on the module, such as the hooks by which FSDP2
    gathers its parameters, then works around both runs.
    """
    backend = requested()  # on a GPU the second run is in autograd's thread

    def run(*args):
        with use_backend(backend):
            return function(*args)

    if is_forward_mode():
        return checkpoint_dual(run, block, *args)
    tensors, rebuild = _tensors(args)  # PyTorch's reentrant form finds no others than arguments
    structure = []

    def run_flat(block, *tensors):
        outputs, *structure[:] = _tensors(run(block, *rebuild(tensors)))
        return tuple(outputs)

    outputs = checkpoint(run_flat, block, *tensors)
    return structure[0](outputs)


def checkpoint_dual(function, *args):
    """function(*args) with tangents; until backward only the tensors in `args` are kept.

    What torch.utils.checkpoint cannot: it would count the tangents' activations and miss them in
    its second run. Here one run without a graph makes outputs and tangents, and backward runs the
    function again on the primals. Gradients reach the tensors in `args` and the parameters of the
    modules in `args`; the outputs' tangents are constants.
    """
    tensors, rebuild = _tensors(args)
    duals = [forward_ad.unpack_dual(tensor) for tensor in tensors]
    modules = (leaf for leaf in tree_leaves(args) if isinstance(leaf, nn.Module))
    parameters = [parameter for module in modules for parameter in module.parameters()]
    again = _Again(lambda inputs: function(*rebuild(inputs)), parameters, duals[0].primal)
    with torch.no_grad():
        plain = [_dual(dual.primal.detach(), dual.tangent) for dual in duals]
        outputs, rebuild_outputs = _tensors(function(*rebuild(plain)))
    outputs = [forward_ad.unpack_dual(out) for out in outputs]
    primals = _Recomputed.apply(
        again, len(outputs), *(out.primal for out in outputs), *(dual.primal for dual in duals),
        *parameters,
    )  # fmt: skip
    pairs = zip(primals, outputs, strict=True)
    return rebuild_outputs([_dual(primal, out.tangent) for primal, out in pairs])


def _tensors(tree) -> tuple[list[Tensor], Callable]:
    """The tensors in a tree of arguments, and what makes the tree of others in their place."""
    leaves, structure = tree_flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors):
        filled = dict(zip(places, tensors, strict=True))
        return tree_unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)], structure)

    return [leaves[i] for i in places], rebuild


def _dual(primal: Tensor, tangent: Tensor | None) -> Tensor:
    return primal if tangent is None else forward_ad.make_dual(primal, tangent.detach())


class _Again:
    """A second run with the random numbers and under the autocast of the first."""

    def __init__(self, run: Callable, parameters: list[nn.Parameter], like: Tensor):
        self.run, self.parameters, device = run, parameters, like.device.type
        self.autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        self.device_type, self.cpu_state = device, torch.get_rng_state()
        self.devices, self.states = get_device_states(like)

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.autocast)
            stack.enter_context(torch.random.fork_rng(self.devices))
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.states, device_type=self.device_type)
            return _tensors(self.run(tensors))[0]


class _Recomputed(torch.autograd.Function):
    """Outputs as they are; for their gradients they are made again."""

    @staticmethod
    def forward(again, n_outputs, *tensors):
        return tuple(tensor.view_as(tensor) for tensor in tensors[:n_outputs])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.again, ctx.n_outputs, *tensors = inputs
        ctx.save_for_backward(*tensors[ctx.n_outputs : len(tensors) - len(ctx.again.parameters)])

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        needs = ctx.needs_input_grad[2 + ctx.n_outputs :]
        inputs = [
            x.detach().requires_grad_(is_needed)
            for x, is_needed in zip(ctx.saved_tensors, needs, strict=False)
        ]
        sources = [*inputs, *ctx.again.parameters]
        wanted = [x for x, is_needed in zip(sources, needs, strict=True) if is_needed]
        pairs = zip(ctx.again(inputs), gradients, strict=True)
        outputs, gradients = zip(*((o, g) for o, g in pairs if o.requires_grad), strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        filled = (next(found) if is_needed else None for is_needed in needs)
        return None, None, *[None] * ctx.n_outputs, *filled
