"""Representative calls of every op, at the shapes of the published models.

What the resource report compiles, the cost model counts and the benchmarks time: each op as the
models call it, beside the same in eager PyTorch.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import tim_kernels as ops
from tim_kernels import TimeMLP
from tim_kernels.swiglu.op import swiglu_with_paths

from ..record.rows import folder
from . import eager
from .shapes import Shape

DIRECTIONS = ("forward", "backward", "jvp")
EPSILON = 0.005  # of the derivative's central difference


class Call(NamedTuple):
    """`function(*tensors, *constants)` is one call of an op, `eager` the same in plain PyTorch.

    Both are differentiable in every one of `tensors`, or `directions` has but "forward".
    """

    name: str
    function: Callable
    tensors: tuple[Tensor, ...]
    eager: Callable | None = None
    constants: tuple[Tensor, ...] = ()
    directions: tuple[str, ...] = DIRECTIONS

    @property
    def op(self) -> str:
        """The folder of tim_kernels that computes it."""
        return folder(self.name)

    def run(self, direction: str, function: Callable | None = None) -> None:
        """The forward, or the forward and what follows it in that direction."""
        function = function or self.function
        if direction == "forward":
            function(*self.tensors, *self.constants)
        elif direction == "backward":
            leaves = [tensor.detach().requires_grad_() for tensor in self.tensors]
            out = function(*leaves, *self.constants)
            out = [out] if isinstance(out, Tensor) else list(out)
            torch.autograd.grad(out, leaves, [torch.empty_like(o) for o in out])
        else:
            tangents = tuple(torch.empty_like(tensor) for tensor in self.tensors)
            torch.func.jvp(lambda *x: function(*x, *self.constants), self.tensors, tangents)


def maker(dtype: torch.dtype, device: str | torch.device) -> Callable[..., Tensor]:
    """Makes tensors of a shape: of noise, but on the meta device."""
    is_meta = torch.device(device).type == "meta"
    generator = None if is_meta else torch.Generator(device).manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        if is_meta:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return make


def _with_bias(op: Callable, *tensors: Tensor):
    """It has no eager twin: eager code has the bias elsewhere."""
    return op(*tensors[:-1], branch_bias=tensors[-1])


def calls(
    width: int = 1152, head_dim: int = 72, dtype: torch.dtype = torch.bfloat16, batch: int = 256,
    grid: tuple[int, int] = (16, 16), latent: tuple[int, int, int] = (4, 32, 32),
    grids: tuple[tuple[int, int], ...] | None = None, device: str | torch.device = "meta",
) -> Iterator[Call]:  # fmt: skip
    """Every op at one width: tokens (batch, height·width of the grid, width), latents apart.

    With `grids` the tokens of one sequence each are packed, (T, width), and ops that do not know
    tokens are left out. On a real device tensors hold noise.
    """
    shape = Shape(batch, grid, latent, width, head_dim, grids)
    heads, hidden = width // head_dim, width * 8 // 3
    tokens, where, segments = (batch, grid[0] * grid[1]), dict(grid=grid), None
    if grids:
        batch, tokens = len(grids), (shape.tokens,)
        segments = ops.Segments.from_lengths([h * w for h, w in grids], device)
        sizes = torch.tensor(grids, dtype=torch.int32).to(device)
        where = dict(sizes=sizes, segments=segments)
    plain = eager.Tokens(grid, grids, head_dim, device)
    make = maker(dtype, device)
    x, branch = make(*tokens, width), make(*tokens, width)
    gate, shift, scale, bias = (make(batch, width) for _ in range(4))

    forms = {
        "ada_layer_norm": (x, shift, scale),
        "gated_residual": (x, branch, gate),
        "gated_residual_ada_layer_norm": (x, branch, gate, shift, scale),
    }
    for name, tensors in forms.items():
        op = functools.partial(getattr(ops, name), segments=segments)
        yield Call(name, op, tensors, getattr(plain, name))
    for name, tensors in list(forms.items())[1:] if not grids else ():
        op = functools.partial(_with_bias, getattr(ops, name))
        yield Call(f"{name} with branch bias", op, (*tensors, bias))

    qkv = make(*tokens, 3, heads, head_dim)
    q, k, _ = qkv.unbind(-3)
    affine = [make(head_dim) for _ in range(4)]
    yield Call(
        "qk_norm_rope",
        lambda *args: ops.qk_norm_rope(*args[:6], q_shift=args[6], k_shift=args[7], **where),
        (q, k, *affine, shift, scale),
        plain.qk_norm_rope,
    )
    yield Call(
        "qk_norm_rope of packed qkv",
        lambda *args: ops.qkv_norm_rope(*args[:5], q_shift=args[5], k_shift=args[6], **where),
        (qkv, *affine, shift, scale),
        plain.qkv_norm_rope,
    )
    yield Call(
        "qk_norm_rope of q alone",
        lambda q, *args: ops.qk_norm_rope(q, None, *args, **where),
        (make(*tokens, heads, head_dim), *affine[:2]),
        plain.norm_rope,
    )

    yield Call("swiglu", ops.swiglu, (make(*tokens, 2 * hidden),), eager.packed_swiglu)
    if grids:
        return
    halves, paths = [make(*tokens, hidden) for _ in range(2)], [make(hidden) for _ in range(2)]
    yield Call("swiglu with paths of biases", swiglu_with_paths, (*halves, *paths))

    yield Call("attention", ops.attention, qkv.unbind(-3), eager.attention)

    t, r = make(batch, dtype=torch.float32), make(batch, dtype=torch.float32)
    mlps = [make(*shape) / shape[-1] ** 0.5
            for shape in [(width, 256), (width,), (width, width), (width,)] * 2]  # fmt: skip
    yield Call(
        "time_pair_embedding",
        lambda t, r, *mlps: ops.time_pair_embedding(t, r, TimeMLP(*mlps[:4]), TimeMLP(*mlps[4:])),
        (t, r, *mlps),
        eager.time_pair_embedding,
    )

    half = batch // 2 or 1  # the samples with r ≠ t, which need a derivative
    x, z = (make(batch, *latent, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    F, F_cond, F_uncond = (make(batch, *latent) for _ in range(3))
    sizes = batch, batch, half, half, 2 * half, 2 * half
    vectors = [make(size, dtype=torch.float32) for size in sizes]
    yield Call(
        "transition_inputs", ops.transition_inputs, (x, z, *vectors), eager.transition_inputs
    )
    neighbours = make(2 * half, *latent)
    yield Call(
        "transition_loss",
        lambda F, x, z, neighbours, *a: ops.transition_loss(F, x, z, a, neighbours, EPSILON),
        (F,),
        lambda F, x, z, neighbours, *a: eager.transition_loss(F, x, z, neighbours, EPSILON, *a),
        (x, z, neighbours, *(make(batch, dtype=torch.float32) for _ in range(5))),
    )
    state = make(batch, *latent, dtype=torch.float64)
    guidance, a, b = (make(batch, dtype=torch.float64) for _ in range(3))
    yield Call(
        "transition_step",
        lambda x, cond, uncond, guidance, a, b: ops.transition_step(
            x, cond, (a, b, None), uncond, guidance
        ),
        (state, F_cond, F_uncond, guidance, a, b),
        eager.transition_step,
    )
