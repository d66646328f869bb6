"""Pictures to latents and back, or pictures as they are."""

from pathlib import Path

import diffusers
import torch
from torch import Tensor

from tim.checks import whole

# By what some autoencoders shift and scale their latents beside scaling_factor.
_OTHER_SCALES = ("shift_factor", "latents_mean", "latents_std")


class Autoencoder:
    """An `AutoencoderKL` (SD-VAE) or `AutoencoderDC` (DC-AE) of diffusers, scaled as published.

    Latents are multiplied by the `scaling_factor` of the autoencoder's config: their variance is
    about 1. It computes in its own dtype, float32 as published, whatever autocast says.
    `factor` is by how much it shrinks a side, `channels` the latents'.

    Raises:
        ValueError: another autoencoder, or one whose latents are also shifted.

    Example::

        autoencoder = Autoencoder.load("stabilityai/sd-vae-ft-ema")
        z = autoencoder.encode(images)  # (B, 3, 256, 256) in [-1, 1] → (B, 4, 32, 32)
        images = autoencoder.decode(z)
    """

    def __init__(self, model: diffusers.AutoencoderKL | diffusers.AutoencoderDC):
        config = getattr(model, "config", {})
        blocks = config.get("encoder_block_out_channels") or config.get("block_out_channels")
        if not blocks or not config.get("scaling_factor"):
            raise ValueError(
                f"an AutoencoderKL or AutoencoderDC is needed, got {type(model).__name__}"
            )
        if others := [name for name in _OTHER_SCALES if config.get(name)]:
            raise ValueError(
                f"the autoencoder must scale by scaling_factor alone, got {', '.join(others)}"
            )
        self.model = model
        self.scaling_factor: float = config["scaling_factor"]
        self.factor: int = 2 ** (len(blocks) - 1)
        self.channels: int = config["latent_channels"]

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        tile: int | None = None,
    ) -> "Autoencoder":
        """From a folder or the hub, in eval mode.

        Pictures with a side longer than `tile` pixels go through in tiles of that size without
        overlap; as published 2048 to train on text and 2560 to sample.

        Raises:
            ValueError: see the class; or a `tile` that is no multiple of `factor`.
            OSError: it is neither a folder nor to be had from the hub.
        """
        model = diffusers.AutoModel.from_pretrained(str(folder), torch_dtype=dtype)
        autoencoder = cls(model.to(device))
        if tile is not None:
            autoencoder._tile(whole("tile", tile, 1))
        return autoencoder

    def _tile(self, size: int) -> None:
        if size % self.factor:
            raise ValueError(f"tile must be a multiple of {self.factor}, got {size}")
        if isinstance(self.model, diffusers.AutoencoderDC):
            self.model.enable_tiling(size, size, size, size)
            return
        self.model.enable_tiling()
        self.model.tile_sample_min_size = size
        self.model.tile_latent_min_size = size // self.factor
        self.model.tile_overlap_factor = 0

    @torch.no_grad()
    def encode(
        self, images: Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → scaled latents (B, channels, H/factor, W/factor).

        Of an `AutoencoderKL` a sample of the posterior, drawn from `generator`, or of each image
        from its own; an `AutoencoderDC` draws nothing.

        Raises:
            ValueError: the images are of another shape, or H or W is no multiple of `factor`.
        """
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or any(n % self.factor for n in images.shape[2:])
        ):
            raise ValueError(
                f"images must be (B, 3, H, W), sides multiples of {self.factor}; "
                f"got {tuple(images.shape)}"
            )
        with torch.autocast(images.device.type, enabled=False):
            encoded = self.model.encode(images.to(self.model.dtype))
        has_posterior = hasattr(encoded, "latent_dist")
        z = encoded.latent_dist.sample(generator) if has_posterior else encoded.latent
        return z * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, channels, h, w) → images (B, 3, h·factor, w·factor), about [-1, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.model.decode(latents.to(self.model.dtype) / self.scaling_factor).sample


class Pixels:
    """In place of an `Autoencoder` for a network that draws pictures themselves, of so many
    channels: nothing is shrunk."""

    factor = 1

    def __init__(self, channels: int):
        if channels not in (1, 3):
            raise ValueError(
                f"without an autoencoder the network must have 1 or 3 channels, those of pictures; "
                f"got {channels}"
            )
        self.channels = channels

    def decode(self, pictures: Tensor) -> Tensor:
        """(B, channels, H, W), about [-1, 1], as they are."""
        return pictures
