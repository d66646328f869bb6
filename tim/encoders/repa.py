"""What a vision encoder is shown for REPA (arXiv 2410.06940)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tim.models.radio import Radio


@torch.no_grad()
def repa_targets(encoder: Radio, images: Tensor, tokens: tuple[int, int]) -> Tensor:
    """Features that a block's output is aligned with, (B, h·w, encoder width), tokens row-major.

    The images are resized, bicubic and not clamped, to one patch of the encoder for each token.

    Args:
        encoder: see `tim.models.radio.load`.
        images: (B, 3, H, W) in [-1, 1], on the encoder's device.
        tokens: (h, w) of the network: of its latents, sides over its patch_size.

    Raises:
        ValueError: the images are of another shape.

    Example::

        encoder = radio.load("checkpoints/radio/radio-v2.5-b_half.pth.tar")
        features = repa_targets(encoder, images, (16, 16))  # of 256×256 pixels, (B, 256, 768)
    """
    size = [side * encoder.patch_size for side in tokens]
    return encoder(F.interpolate((images.float() + 1) / 2, size, mode="bicubic"))
