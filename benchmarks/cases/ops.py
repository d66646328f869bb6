"""One op in one direction at one shape, and the work that this is."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import forms, peers
from .calls import Call, calls
from .shapes import Shape

DIRECTIONS = ("forward", "backward", "forward + backward", "tangent")


class OpCase(NamedTuple):
    shape_name: str
    shape: Shape
    call: str
    direction: str
    dtype: torch.dtype = torch.bfloat16

    @property
    def title(self) -> str:
        return f"{self.call}, {self.direction}, {self.shape_name}"

    def call_on(self, device: str) -> Call:
        return next(c for c in shape_calls(self.shape, self.dtype, device) if c.name == self.call)


def shape_calls(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Call]:
    """Every call with an eager twin at a shape; those of peers and other models need unpacked
    tokens."""
    everything = [calls(**shape._asdict(), dtype=dtype, device=device)]
    if not shape.grids:
        everything += [more.calls(shape, dtype, device) for more in (peers, forms)]
    return (c for c in itertools.chain(*everything) if c.eager is not None)


def op_cases(
    shapes: dict[str, Shape],
    dtype: torch.dtype = torch.bfloat16,
    directions: Sequence[str] = DIRECTIONS,
    attention: bool = False,
) -> list[OpCase]:
    """Attention is only there if asked for: it is PyTorch's but for the tangent, which is compared
    in compare/derivative.py."""
    return [
        OpCase(name, shape, call.name, direction, dtype)
        for name, shape in shapes.items()
        for call in shape_calls(shape, dtype, "meta")
        if attention or call.name != "attention"
        for direction in directions
    ]


def thunk(
    direction: str, function: Callable, wrap: Callable, tensors, constants, dtype: torch.dtype
) -> Callable:
    """A call without arguments that does the direction's work; what comes before it is done."""

    def noise(like: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(like.device).manual_seed(seed)
        random = torch.randn(like.shape, generator=generator, device=like.device)
        return random.to(dtype).to(like.dtype)

    if direction == "forward":
        run = wrap(function)
        return lambda: run(*tensors, *constants)
    if direction == "tangent":
        tangents = tuple(noise(tensor, 200 + i) for i, tensor in enumerate(tensors))
        run = wrap(
            lambda primals, tangents: torch.func.jvp(
                lambda *x: function(*x, *constants), primals, tangents
            )[1]
        )
        return lambda: run(tuple(tensors), tangents)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    run = wrap(function)
    outputs = flat(run(*leaves, *constants))
    cotangents = [noise(out, 100 + i) for i, out in enumerate(outputs)]
    if direction == "backward":
        return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
    return lambda: torch.autograd.grad(flat(run(*leaves, *constants)), leaves, cotangents)


def flat(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
