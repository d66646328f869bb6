"""Representative calls of every op, on meta tensors, at the shapes of the published models.

What the resource report compiles and the cost model counts: each op as the models call it.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import tim_kernels as ops
from tim_kernels.time_pair_embedding.reference import TimeMLP

DIRECTIONS = ("forward", "backward", "jvp")


class Call(NamedTuple):
    """`function(*tensors)` is one call of an op; it is differentiable in every one of `tensors`."""

    name: str
    function: Callable
    tensors: tuple[Tensor, ...]

    def run(self, direction: str) -> None:
        """The forward, or the forward and what follows it in that direction."""
        if direction == "forward":
            self.function(*self.tensors)
        elif direction == "backward":
            leaves = [tensor.detach().requires_grad_() for tensor in self.tensors]
            out = self.function(*leaves)
            out = [out] if isinstance(out, Tensor) else list(out)
            torch.autograd.grad(out, leaves, [torch.empty_like(o) for o in out])
        else:
            tangents = tuple(torch.empty_like(tensor) for tensor in self.tensors)
            torch.func.jvp(self.function, self.tensors, tangents)


def calls(
    width: int = 1152, head_dim: int = 72, dtype: torch.dtype = torch.bfloat16, batch: int = 256,
    grid: tuple[int, int] = (16, 16), latent: tuple[int, int, int] = (4, 32, 32),
) -> Iterator[Call]:  # fmt: skip
    """Every op at one width: tokens (batch, height·width of the grid, width), latents apart."""
    N, heads, hidden = grid[0] * grid[1], width // head_dim, width * 8 // 3

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, branch = make(batch, N, width), make(batch, N, width)
    gate, shift, scale, bias = (make(batch, width) for _ in range(4))
    yield Call("ada_layer_norm", ops.ada_layer_norm, (x, shift, scale))
    yield Call(
        "gated_residual",
        lambda *args: ops.gated_residual(*args[:3], branch_bias=args[3]),
        (x, branch, gate, bias),
    )
    yield Call(
        "gated_residual_ada_layer_norm",
        lambda *args: ops.gated_residual_ada_layer_norm(*args[:5], branch_bias=args[5]),
        (x, branch, gate, shift, scale, bias),
    )

    q, k, _ = make(batch, N, 3 * width).unflatten(-1, (3, heads, head_dim)).unbind(2)
    affine = [make(head_dim) for _ in range(4)]
    yield Call(
        "qk_norm_rope",
        lambda *args: ops.qk_norm_rope(*args[:6], grid=grid, q_shift=args[6], k_shift=args[7]),
        (q, k, *affine, shift, scale),
    )
    yield Call(
        "qk_norm_rope of q alone",
        lambda q, *args: ops.qk_norm_rope(q, None, *args, grid=grid),
        (make(batch, N, heads, head_dim), *affine[:2]),
    )

    yield Call("swiglu", ops.swiglu, (make(batch, N, 2 * hidden),))

    t, r = make(batch, dtype=torch.float32), make(batch, dtype=torch.float32)
    mlps = [make(width, 256), make(width), make(width, width), make(width)] * 2
    yield Call(
        "time_pair_embedding",
        lambda t, r, *mlps: ops.time_pair_embedding(t, r, TimeMLP(*mlps[:4]), TimeMLP(*mlps[4:])),
        (t, r, *(torch.empty_like(tensor) for tensor in mlps)),
    )

    half = batch // 2  # the samples with r ≠ t, which need a derivative
    x, z, F, F_cond, F_uncond = (make(batch, *latent) for _ in range(5))
    sizes = batch, batch, half, half, 2 * half, 2 * half
    vectors = [make(size, dtype=torch.float32) for size in sizes]
    yield Call("transition_inputs", ops.transition_inputs, (x, z, *vectors))
    coefficients, neighbours = [t] * 5, make(2 * half, *latent)
    yield Call(
        "transition_loss",
        lambda F: ops.transition_loss(F, x, z, coefficients, neighbours, 0.005),
        (F,),
    )
    state = make(batch, *latent, dtype=torch.float64)
    guidance, a, b = (make(batch, dtype=torch.float64) for _ in range(3))
    yield Call(
        "transition_step",
        lambda x, cond, uncond, guidance, a, b: ops.transition_step(
            x, cond, (a, b, None), uncond, guidance
        ),
        (state, F_cond, F_uncond, guidance, a, b),
    )
