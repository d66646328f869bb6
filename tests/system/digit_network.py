"""Digits as 8-bit pictures, and the classifier of digits as the network that FID looks through."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from tim.evaluation import mnist
from tim.evaluation.features import Features
from tim.evaluation.scores import spatial_features


class DigitNetwork:
    """Counts the pictures that it was shown."""

    name = "digit classifier"

    def __init__(self, classifier: mnist.DigitClassifier):
        self._maps = nn.Sequential(*classifier.convolutions[:8])  # (N, 64, 14, 14)
        self._rest = nn.Sequential(*classifier.convolutions[8:])
        self._head, self.shown = classifier.head, 0

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> Features:
        self.shown += len(pictures)
        maps = self._maps(pictures[:, :1].float() / 127.5 - 1)
        pool = self._rest(maps)
        return Features(pool, spatial_features(maps[:, :, ::5, ::5]), self._head(pool))


def levels(images: torch.Tensor) -> np.ndarray:
    """(N, 1, 28, 28) in [-1, 1] → uint8 (N, 28, 28, 3)."""
    grey = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    return grey.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def save(images: torch.Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, picture in enumerate(levels(images)):
        Image.fromarray(picture).save(folder / f"{number:06}.png")
    return folder


def reference(images: torch.Tensor, network: DigitNetwork, path: Path) -> Path:
    """An npz as ADM gives: pictures and statistics."""
    pictures = levels(images)
    seen = network(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    statistics = {}
    for end, rows in (("", seen.pool), ("_s", seen.spatial)):
        statistics[f"mu{end}"] = rows.double().mean(0).numpy()
        statistics[f"sigma{end}"] = np.cov(rows.double().numpy(), rowvar=False)
    np.savez(path, arr_0=pictures, **statistics)
    return path
