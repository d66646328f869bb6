"""What the network learns to make of a batch: latents or pictures as given, or encoded here."""

from collections.abc import Callable

import torch
from torch import Tensor

from tim.images import by_size
from tim.training.conditioning import Batch
from tim.training.draws import Draws

Latents = Callable[[Batch, Draws], Tensor | list[Tensor]]  # a list of those of several sizes
# Images (B, 3, H, W) in [-1, 1] and a generator for the posterior → scaled latents (B, C, h, w).
Autoencoder = Callable[[Tensor, torch.Generator], Tensor]


class Given:
    """The batch's entry of that name."""

    def __init__(self, name: str = "latent"):
        self.name = name

    def __call__(self, batch: Batch, draws: Draws) -> Tensor | list[Tensor]:
        return batch[self.name]


class Encoded:
    """The batch's `image` through an autoencoder, in float32 and without gradient."""

    def __init__(self, encode: Autoencoder):
        self.encode = encode

    @torch.no_grad()
    def __call__(self, batch: Batch, draws: Draws) -> Tensor | list[Tensor]:
        images = batch["image"]

        def encode(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, enabled=False):
                return self.encode(images.float(), draws.device)

        return encode(images) if isinstance(images, Tensor) else by_size(encode, images)
