"""Inception-v3 of 2015-12-05, the network of FID, with the two preprocessings that benchmarks use.

The network is torch-fidelity's (Apache-2.0), its weights those of ADM's TensorFlow graph.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tim.data.prompts import PAGE
from tim.evaluation.features import Features
from tim.evaluation.scores import spatial_features
from tim.provenance import file_hash

SIDE = 299  # px
_SPATIAL = "Mixed_6d.branch1x1"  # mixed_6/conv after its BN and ReLU
Preprocessing = Literal["adm", "mjhq"]
PREPROCESSINGS = {
    "adm": f"TensorFlow-1 bilinear to {SIDE}², (x − 128) / 128",
    "mjhq": f"bilinear with antialiasing to {SIDE}², 2x − 1",
}


def tensorflow_bilinear(pictures: Tensor, height: int, width: int) -> Tensor:
    """Resize as TensorFlow 1 does: source = i · in / out, without half a pixel's shift.

    Floating-point (…, H, W) → (…, height, width). No antialiasing; values are not clipped.
    """
    return _lerp(_lerp(pictures, -1, width), -2, height)


def _lerp(x: Tensor, dim: int, size: int) -> Tensor:
    scale = torch.tensor(x.shape[dim] / size, dtype=torch.float32, device=x.device)
    source = torch.arange(size, dtype=torch.float32, device=x.device) * scale
    low = source.long()
    high = (low + 1).clamp_max(x.shape[dim] - 1)
    part = (source - low).to(x.dtype)
    low, high = x.index_select(dim, low), x.index_select(dim, high)
    return low + (high - low) * (part if dim == -1 else part[:, None])


def antialiased_bilinear(pictures: Tensor, height: int, width: int) -> Tensor:
    """Resize as torchvision does a tensor: bilinear with antialiasing, (N, C, H, W) floating."""
    return F.interpolate(pictures, (height, width), mode="bilinear", antialias=True)


def preprocessed(pictures: Tensor, kind: Preprocessing) -> Tensor:
    """uint8 (N, 3, H, W) → float32 (N, 3, 299, 299) as the network takes it.

    "adm": TensorFlow-1 bilinear of 0–255, then (x − 128) / 128. "mjhq": antialiased bilinear of
    [0, 1], then 2x − 1.
    """
    if kind == "adm":
        return (tensorflow_bilinear(pictures.float(), SIDE, SIDE) - 128) / 128
    return 2 * antialiased_bilinear(pictures.float() / 255, SIDE, SIDE) - 1


class Inception:
    """Pictures uint8 (N, 3, H, W) → features: pool (2048), spatial (2023), logits (1008).

    Logits are without the bias, as the Inception score has them. Arithmetic is float32, TF32 off.

    Args:
        weights: `pt_inception-2015-12-05-6726825d.pth`, docs/evaluation.md says where from; None
            lets torch-fidelity download it.
        kind: the preprocessing, "adm" or "mjhq".
        spatial: whether to give the spatial features and the logits.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: torch-fidelity, or the torchvision that it needs, cannot be imported.
        ValueError: the weights are another network's, or the preprocessing is unknown.
    """

    def __init__(
        self, weights: str | Path | None, kind: Preprocessing, *, device: str = "cpu",
        spatial: bool = True,
    ):  # fmt: skip
        if kind not in PREPROCESSINGS:
            raise ValueError(f"kind must be one of {', '.join(PREPROCESSINGS)}, got {kind!r}")
        self._network = _network(weights).to(device)
        self._layers = [layer for name, layer in self._network.named_children() if name != "fc"]
        self.kind, self.device, self._gives_all = kind, device, spatial
        self._maps: Tensor | None = None
        self._network.get_submodule(_SPATIAL).register_forward_hook(self._keep)
        source = "downloaded" if weights is None else f"sha256 {file_hash(Path(weights))}"
        self.name = f"Inception-v3 2015-12-05 ({source}); {PREPROCESSINGS[kind]}"
        if spatial:
            self.name += "; pool, spatial, logits"

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], maps: Tensor) -> None:
        self._maps = maps

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Features:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = preprocessed(pictures.to(self.device), self.kind)
            for layer in self._layers:
                x = layer(x)
        pool, maps, self._maps = x.flatten(1), self._maps, None
        if not self._gives_all:
            return Features(pool)
        return Features(pool, spatial_features(maps), pool @ self._network.fc.weight.T)


def _network(weights: str | Path | None) -> nn.Module:
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"there is no file {weights} of Inception's weights: see {PAGE}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # beside another build of torch, torchvision raises RuntimeError
        reason = " ".join(str(error).split())
        raise ImportError(
            f'Inception needs torch-fidelity and torchvision: pip install "tim-kernels[eval]" '
            f"({reason})"
        ) from error
    path = None if weights is None else str(weights)
    try:
        if path is not None:  # torch-fidelity would run any code that a file holds
            torch.load(path, map_location="cpu", weights_only=True)
        return FeatureExtractorInceptionV3(
            "inception-v3", ["2048"], feature_extractor_weights_path=path
        )
    except OSError as error:
        raise OSError(f"Inception's weights cannot be fetched ({error}): see {PAGE}") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{weights} holds no weights of this Inception: {reason[:200]}; see {PAGE}"
        ) from error
