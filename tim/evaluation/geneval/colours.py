"""The colour of an object by CLIP, zero-shot."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from tim.checks import check_computed
from tim.evaluation.clip import DEFAULT, features_of, normalised
from tim.evaluation.geneval.objects import COLOURS, Detection
from tim.evaluation.weights import described, load, pretrained

TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
_GREY = (153, 153, 153)


class ClipColours:
    """A colour classifier: objects of a picture → the colours of GenEval's ten they look like.

    Args:
        model: a CLIP of transformers.
        tokenizer: the model's.
        name: what it is called in results.
    """

    def __init__(
        self, model: transformers.CLIPModel, tokenizer: transformers.PreTrainedTokenizerBase,
        name: str | Path,
    ):  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        self.side = model.config.vision_config.image_size
        self.settings = described("colours", name, model)
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(
        cls, name: str | Path = DEFAULT, device: torch.device | str | None = None
    ) -> "ClipColours":
        """From a folder or the hub, float32.

        Raises:
            FileNotFoundError: it is in neither.
        """
        model = load(transformers.CLIPModel, name, device, dtype=torch.float32)
        return cls(model, pretrained(transformers.AutoTokenizer, name), name)

    @torch.no_grad()
    def __call__(self, picture: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        crops = torch.stack([pixels(crop(picture, each), self.side) for each in objects])
        device = self.model.device
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            images = features_of(self.model.get_image_features(pixel_values=crops.to(device)))
            logits = colour_logits(self._texts_of(name), images.float())
        check_computed("features of colours", logits, "CLIP", images.dtype)
        return [COLOURS[index] for index in logits.argmax(1).tolist()]

    def _texts_of(self, name: str) -> Tensor:
        """Features (colour, template, D) of a class, computed once."""
        if name not in self._texts:
            texts = [template.format(colour, name) for colour in COLOURS for template in TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
            inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
            features = features_of(self.model.get_text_features(**inputs)).float()
            self._texts[name] = features.unflatten(0, (len(COLOURS), len(TEMPLATES)))
        return self._texts[name]


def colour_logits(texts: Tensor, images: Tensor) -> Tensor:
    """100 × cosine (N, colour) of pictures (N, D) to the mean of each colour's texts (colour,
    template, D), all of them unit vectors first."""
    colours = normalize(normalize(texts, dim=-1).mean(1), dim=-1)
    return 100 * normalize(images, dim=-1) @ colours.mT


def crop(picture: Image.Image, detection: Detection) -> Image.Image:
    """An object within its box, grey outside its mask; corners are rounded half to even.

    Raises:
        ValueError: the box is empty, or the mask is not of the picture's size.
    """
    corners = tuple(round(float(x)) for x in detection.box)
    if corners[2] <= corners[0] or corners[3] <= corners[1]:
        raise ValueError(f"a box must have an inside, got {detection.name} at {detection.box}")
    if detection.mask is not None:
        if detection.mask.shape != picture.size[::-1]:
            raise ValueError(
                f"masks must be (height, width) = {picture.size[::-1]}, got {detection.mask.shape}"
            )
        mask = Image.fromarray(np.asarray(detection.mask, dtype=np.uint8) * 255)
        picture = Image.composite(picture, Image.new("RGB", picture.size, _GREY), mask)
    return picture.crop(corners)


def pixels(image: Image.Image, side: int) -> Tensor:
    """CLIP's input (3, side, side): shorter side to `side`, bicubic, and the middle of it."""
    width, height = image.size
    shorter = min(width, height)
    width, height = side * width // shorter, side * height // shorter
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    image = image.crop((left, top, left + side, top + side))
    levels = torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255
    return normalised(levels)
