"""The features that a block's output is aligned with (REPA, arXiv 2410.06940)."""

from collections.abc import Callable

import torch
from torch import Tensor

from tim.checks import check_computed
from tim.images import by_size

# Images (B, 3, H, W) in [-1, 1] and the grid (h, w) of tokens → features (B, h·w, z_dim).
VisionEncoder = Callable[[Tensor, tuple[int, int]], Tensor]


class Targets:
    """A vision encoder's features of a batch's images, without gradient.

    Of tensors (B, 3, H, W) and latents (B, C, h, w) they are (B, N, z_dim). Of lists, of any sizes,
    they are (T, z_dim), packed as `tim.models.pack` packs the latents.

    Raises:
        ValueError: the features are not (B, N, z_dim).
        FloatingPointError: those of the first batch are not finite.
    """

    def __init__(self, encoder: VisionEncoder, z_dim: int, patch_size: int):
        self.encoder, self.z_dim, self.patch_size = encoder, z_dim, patch_size
        self._is_checked = False

    @torch.no_grad()
    def __call__(self, images: Tensor | list[Tensor], latents: Tensor | list[Tensor]) -> Tensor:
        if isinstance(images, Tensor) and isinstance(latents, Tensor):
            features = self._of_one_size(images, latents)
        else:
            features = torch.cat(by_size(self._of_one_size, images, latents))
        if not self._is_checked:  # once: it reads the tensor
            check_computed("the vision encoder's features", features, "its forward", features.dtype)
            self._is_checked = True
        return features

    def _of_one_size(self, images: Tensor, latents: Tensor) -> Tensor:
        h, w = (size // self.patch_size for size in latents.shape[-2:])
        features = self.encoder(images, (h, w))
        needed = (len(latents), h * w, self.z_dim)
        if features.shape != needed:
            raise ValueError(
                f"the vision encoder must give features {needed}, got {tuple(features.shape)}"
            )
        return features
