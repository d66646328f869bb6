"""Any-step sampling of pictures of different sizes at once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from tim.models import Packing, pack, unpack
from tim.transports import Transport

from .loop import sample

Pictures = list[Tensor]


def sample_packed(
    model: nn.Module,
    transport: Transport,
    z: Sequence[Tensor],
    y: Tensor,
    y_null: Tensor | None = None,
    *,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    return_trajectory: bool = False,
    on_step: Callable[[int, float, Pictures], Pictures] | None = None,
    text_lengths: Sequence[int] | None = None,
    **options: Any,
) -> Pictures:
    """`sample` of S pictures of any sizes, in one row of tokens: each is as if it were alone.

    Args:
        model: one that takes a `packing`: TiMTransformer2DModel, or what `accelerate` fused.
        z: the states (C, H, W), S of them, and y and y_null of as many.
        generator: of the added noise; one, from which pictures draw in turn, or one a picture.
        on_step: as of `sample`, given and giving the S states.
        text_lengths: how many tokens of each picture's text in y and y_null are read; all of them
            by default, padding too.
        others: as of `sample`.

    Returns the S pictures (C, H, W), or their trajectories (num_steps + 1, C, H, W).

    Raises:
        ValueError: as `sample` and `pack`; generators of another number than the pictures; an
            on_step that returns others, or other sizes.

    Example:
        >>> z = [transport.initial_state(torch.randn(4, *size)) for size in ((32, 48), (64, 32))]
        >>> images = sample_packed(network, transport, z, labels, num_steps=4)
    """
    if options.get("guider") is not None:
        raise ValueError("a guider looks at whole pictures, and these are packed as tokens")
    tokens, packing = pack(z, model.x_embedder.proj.kernel_size[0])
    if text_lengths is not None:
        packing = packing.reading(text_lengths, y.shape[1])
    draw = generator
    if isinstance(generator, (list, tuple)):
        if len(generator) != len(packing):
            raise ValueError(
                f"{len(packing)} generators are needed, one a picture; got {len(generator)}"
            )
        draw = _Noise(packing, generator)
    elif generator is not None:
        draw = _Noise(packing, [generator] * len(packing))

    def on_tokens(step: int, time: float, state: Tensor) -> Tensor:
        return _repacked(on_step(step, time, unpack(state, packing)), state, packing)

    x = sample(
        _OnTokens(model, packing), transport, tokens, y, y_null, generator=draw,
        return_trajectory=return_trajectory, on_step=None if on_step is None else on_tokens,
        **options,
    )  # fmt: skip
    if not return_trajectory:
        return unpack(x, packing)
    states = zip(*(unpack(state, packing) for state in x), strict=True)
    return [torch.stack(of_one) for of_one in states]


def _repacked(pictures: Pictures, state: Tensor, packing: Packing) -> Tensor:
    """The tokens of what a callback made of the pictures of `state`."""
    shapes = [tuple(x.shape) for x in unpack(state, packing)]
    got = [tuple(getattr(x, "shape", ())) for x in pictures] if pictures is not None else None
    if got != shapes:
        raise ValueError(f"on_step must return the states, of shapes {shapes}; got {got}")
    return pack(pictures, state.shape[-1])[0]


class _OnTokens(nn.Module):
    """The network as the sampler calls it, to which a token is a sample with a time of its own."""

    def __init__(self, model: nn.Module, packing: Packing):
        super().__init__()
        self.model, self.packings = model, {1: packing, 2: packing + packing}

    def forward(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        packing = self.packings[len(x) // self.packings[1].total]
        first = packing.segments.cu_seqlens[:-1]
        return self.model(x, t[first], r[first], y, packing=packing)


class _Noise:
    """The noise that every picture would draw alone, shaped as the state."""

    def __init__(self, packing: Packing, generators: Sequence[torch.Generator]):
        self.packing, self.generators = packing, generators

    def __call__(self, x: Tensor) -> Tensor:
        _, C, p, _ = x.shape
        shapes = [(1, C, h * p, w * p) for h, w in self.packing.sizes]
        pairs = zip(shapes, self.generators, strict=True)
        drawn = [randn_tensor(shape, g, x.device, x.dtype)[0] for shape, g in pairs]
        return pack(drawn, p)[0]
