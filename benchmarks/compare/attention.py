"""Attention without a tangent: each kernel that it could be, timed where it is and can.

`attention` takes them in the order of tim_kernels/attention/choice.py, which these rows, by GPU and
shape, can change. Whether cuDNN takes head_dim 72, and how fast, nobody has seen.
"""

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import sdpa_flop_count

from tests.kernels.parity import FLOOR, FORWARD

from ..cases import eager
from ..cases.calls import maker
from ..clock.timing import is_cuda, measure, side_stream
from ..record.rows import EAGER, LeftOut, Op, Row
from .comparison import WrongAnswer
from .derivative import ATTENTION

SMALL = {"small": (2, 16, 2, 72)}
PACKAGES = {
    "flash-attn 4": "flash_attn.cute", "flash-attn 3": "flash_attn_interface",
    "flash-attn 2": "flash_attn",
}  # fmt: skip
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "PyTorch's flash": SDPBackend.FLASH_ATTENTION}
CANDIDATES = EAGER, "flash-attn 4", "flash-attn 3", "cuDNN", "flash-attn 2", "PyTorch's flash"
DIRECTIONS = "forward", "forward + backward"


def kernel(name: str) -> Callable:
    """Of q, k, v (B, N, heads, head_dim); eager is what PyTorch takes of its own accord.

    Raises:
        ImportError: its package is not there.
    """
    if name in PACKAGES:
        run = importlib.import_module(PACKAGES[name]).flash_attn_func

        def packaged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = run(q, k, v)
            return out[0] if isinstance(out, tuple) else out

        return packaged
    if name not in BACKENDS:
        return eager.attention

    def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return eager.attention(q, k, v)

    return chosen


def rows(device: str, dry_run: bool = False) -> Iterator[Row]:
    """One for each kernel, direction and shape in bfloat16; one left out for what cannot run.

    Raises:
        WrongAnswer: after the rows; what is wrong is not timed.
    """
    wrong = []
    for shape, sizes in (SMALL if dry_run else ATTENTION).items():
        make = maker(torch.bfloat16, device)
        batch, tokens, heads, head_dim = sizes
        qkv = make(batch, tokens, 3, heads, head_dim).unbind(2)
        for name in CANDIDATES:
            try:
                function = kernel(name)
                with side_stream(device):
                    if error := _too_far(function, qkv):
                        wrong.append(f"{name} at {shape}: {error}")
                        continue
                    found = [_timed(function, qkv, way, device) for way in DIRECTIONS]
            except Exception as reason:  # of whatever kind another's kernel raises
                if name == EAGER:
                    raise
                yield LeftOut(f"attention by {name} at {shape}", f"{reason!r}"[:500])
                continue
            for direction, (timing, flops) in zip(DIRECTIONS, found, strict=True):
                yield Op(
                    op="attention", direction=direction, shape=shape, contender=name, flops=flops,
                    tflop_per_s=flops / timing.ms / 1e9, **timing.fields(),
                )  # fmt: skip
    if wrong:
        raise WrongAnswer("; ".join(wrong))


def _too_far(function: Callable, qkv: tuple[Tensor, ...]) -> str | None:
    """Its error on the first sample, if that is more than eager's by the rule of the tests."""
    sample = [x[:1] for x in qkv]
    exact = eager.attention(*(x.double() for x in sample))

    def off(out: Tensor) -> float:
        return float((out.double() - exact).norm() / exact.norm())

    error, bound = off(function(*sample)), FORWARD * off(eager.attention(*sample)) + FLOOR
    return f"error {error:.2e} > {bound:.2e}" if error > bound else None


def _timed(function: Callable, qkv: tuple[Tensor, ...], direction: str, device: str):
    leaves = [x.detach().requires_grad_(direction != "forward") for x in qkv]
    weight = torch.ones_like(qkv[0])

    def call():
        out = function(*leaves)
        if direction != "forward":
            torch.autograd.grad(out, leaves, weight)

    shapes = [(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in qkv]
    flops = sdpa_flop_count(*shapes) * (1 if direction == "forward" else 3.5)
    return measure([call], device, seconds=0.1 if is_cuda(device) else 0.02), int(flops)
