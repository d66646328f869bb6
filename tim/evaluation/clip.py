"""CLIP's features of pictures and prompts, and how well they agree."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPModel
from transformers.utils import ModelOutput

from tim.evaluation.features import Features
from tim.evaluation.inception import antialiased_bilinear
from tim.evaluation.weights import load, pretrained
from tim.provenance import weights_hash

DEFAULT = "openai/clip-vit-large-patch14"
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_PROMPTS = 256  # at once


def preprocessed(pictures: Tensor, side: int) -> Tensor:
    """uint8 (N, 3, H, W) → (N, 3, side, side) float32: antialiased bilinear, not cropped."""
    resized = antialiased_bilinear(pictures.float() / 255, side, side)
    return normalised(resized)


def normalised(levels: Tensor) -> Tensor:
    """(…, 3, H, W) of [0, 1] with CLIP's mean and deviation."""
    mean, std = (levels.new_tensor(each)[:, None, None] for each in (_MEAN, _STD))
    return (levels - mean) / std


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Of unit vectors (N, D), row by row: (N,) float64; 100 × their mean is the CLIP score.

    Raises:
        ValueError: shapes differ, as those of two CLIPs do.
    """
    if images.shape != texts.shape or images.ndim != 2:
        raise ValueError(
            "pictures and texts need features of one CLIP, one a picture: "
            f"{tuple(images.shape)} and {tuple(texts.shape)} do not fit"
        )
    return (images.double() * texts.double()).sum(1)


class Clip:
    """A CLIP model of transformers in float32; features are unit vectors (N, D).

    Args:
        name_or_folder: on the Hugging Face hub or on the disk.

    Raises:
        FileNotFoundError: it is neither.
        ValueError: weights are missing or of other shapes.
    """

    def __init__(self, name_or_folder: str | Path = DEFAULT, *, device: str = "cpu"):
        self._model = load(CLIPModel, name_or_folder, device, dtype=torch.float32)
        self._tokenizer = pretrained(AutoTokenizer, name_or_folder)
        self._side = self._model.config.vision_config.image_size
        self.device = device
        self.name = (
            f"CLIP {name_or_folder} (weights {weights_hash(self._model)}); bilinear with "
            f"antialiasing to {self._side}², squashed"
        )

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Features:
        inputs = preprocessed(pictures.to(self.device), self._side)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return Features(_unit(self._model.get_image_features(pixel_values=inputs)))

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts, cut to as many tokens as the model has places (77), → (N, D) on the CPU."""
        longest = self._model.config.text_config.max_position_embeddings
        found = []
        for start in tqdm(range(0, len(prompts), _PROMPTS), desc="prompts"):
            tokens = self._tokenizer(
                list(prompts[start : start + _PROMPTS]), padding=True, truncation=True,
                max_length=longest, return_tensors="pt",
            ).to(self.device)  # fmt: skip
            given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            found.append(_unit(self._model.get_text_features(**given)).cpu())
        return torch.cat(found)


def features_of(output: Tensor | ModelOutput) -> Tensor:
    """Transformers 4 gives the projected features themselves, 5 within an output."""
    return getattr(output, "pooler_output", output)


def _unit(output: Tensor | ModelOutput) -> Tensor:
    return F.normalize(features_of(output), dim=1)
