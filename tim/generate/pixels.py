"""Pictures in [-1, 1] to the levels that are stored, each benchmark's own way."""

import numpy as np
import torch
from torch import Tensor


def truncated(images: Tensor) -> Tensor:
    """⌊clip(255·(x + 1)/2)⌋: half a level dark, as the published FID was measured.

    (…, C, H, W) in [-1, 1] to (…, H, W, 3) uint8; a grey picture's channel is repeated.
    """
    return _levels(255 * ((images.float() + 1) / 2))


def rounded(images: Tensor) -> Tensor:
    """⌊clip(127.5·x + 128)⌋: rounded half up, otherwise as `truncated`."""
    return _levels(127.5 * images.float() + 128)


def _levels(levels: Tensor) -> Tensor:
    levels = levels.clamp(0, 255).to(torch.uint8).movedim(-3, -1)
    return levels.expand(*levels.shape[:-1], 3)


def grid(pictures: np.ndarray) -> np.ndarray:
    """Four pictures (4, H, W, C) as one (2H, 2W, C), row by row."""
    rows = [np.concatenate(list(pictures[i : i + 2]), axis=1) for i in (0, 2)]
    return np.concatenate(rows, axis=0)
