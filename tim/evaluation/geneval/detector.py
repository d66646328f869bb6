"""Objects by Mask2Former (arXiv 2112.01527), made of its output as mmdetection 2 does."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor

from tim.evaluation.geneval.objects import CLASSES, Detection
from tim.evaluation.weights import described, load

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
_SHORT, _LONG, _UNIT = 800, 1333, 32  # px of the input: shorter side, most of the longer, multiple
_MEAN = torch.tensor((123.675, 116.28, 103.53)).view(3, 1, 1)
_STD = torch.tensor((58.395, 57.12, 57.375)).view(3, 1, 1)
_MOST = 100  # objects of a picture
_NOTE = "not mmdetection's weights: scores are near the published ones, not equal"
_AT_ONCE = 16  # masks at the picture's size


class Mask2Former:
    """A detector: an RGB picture → its objects, best first.

    GenEval's own detector has the same architecture; its weights are mmdetection's, so scores are
    near the published ones, not equal.

    Args:
        model: of COCO's 80 classes in COCO's order.
        name: what it is called in results.

    Raises:
        ValueError: the model has another number of classes.
    """

    def __init__(
        self, model: transformers.Mask2FormerForUniversalSegmentation, name: str | Path
    ):  # fmt: skip
        if (num_classes := model.config.num_labels) != len(CLASSES):
            raise ValueError(f"{name} must have COCO's {len(CLASSES)} classes, got {num_classes}")
        self.model = model
        self.settings = described("detector", name, model) | {"detector_note": _NOTE}

    @classmethod
    def load(
        cls, name: str | Path = DETECTOR, device: torch.device | str | None = None
    ) -> "Mask2Former":
        """From a folder or the hub, float32.

        Raises:
            FileNotFoundError: it is in neither.
        """
        kind = transformers.Mask2FormerForUniversalSegmentation
        return cls(load(kind, name, device, dtype=torch.float32), name)

    @torch.no_grad()
    def __call__(self, picture: Image.Image) -> list[Detection]:
        pixels, resized = inputs(picture)
        output = self.model(pixel_values=pixels[None].to(self.model.device))
        sizes = pixels.shape[1:], resized, picture.size[::-1]
        labels, boxes, masks = objects(
            output.class_queries_logits[0], output.masks_queries_logits[0], *sizes
        )
        return [
            Detection(CLASSES[label], box[:4], box[4], mask)
            for label, box, mask in zip(
                labels.tolist(), boxes.tolist(), masks.numpy(), strict=True
            )
        ]  # fmt: skip


def inputs(picture: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """The network's input (3, H, W), padded on the right and below, and the size before that."""
    width, height = picture.size
    scale = min(_LONG / max(width, height), _SHORT / min(width, height))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    levels = torch.from_numpy(np.array(picture)).movedim(-1, 0).float()
    # As cv2's: without antialiasing, whole levels.
    levels = F.interpolate(levels[None], size, mode="bilinear", align_corners=False)[0].round()
    padding = [-side % _UNIT for side in size]
    return F.pad((levels - _MEAN) / _STD, (0, padding[1], 0, padding[0])), size


def objects(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: Sequence[int],
    resized: Sequence[int],
    original: Sequence[int],
    most: int = _MOST,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best (query, class) pairs of class logits (Q, K + 1), the last none, and mask logits
    (Q, h, w); sizes are (height, width) of the padded input, before padding, and of the picture.

    Returns:
        On the CPU, best first: labels (most,), boxes (most, 5) of x1, y1, x2, y2 and score, zero
        where the mask is empty, and masks (most, H, W) bool. The score is the class's probability
        times the mean of the mask's.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    best, pairs = probabilities.flatten().topk(min(most, probabilities.numel()))
    masks, boxes, scores = [], [], []
    for chosen, probability in zip(
        (pairs // num_classes).split(_AT_ONCE), best.split(_AT_ONCE), strict=True
    ):
        logits = _scaled(mask_logits[chosen].float(), padded)[:, : resized[0], : resized[1]]
        logits = _scaled(logits, original)
        mask = logits > 0
        inside = (logits.sigmoid() * mask).flatten(1).sum(1)
        scores.append(probability * inside / (mask.flatten(1).sum(1) + 1e-6))
        boxes.append(_boxes(mask))
        masks.append(mask.cpu())
    score = torch.cat(scores).cpu()
    order = score.argsort(descending=True, stable=True)
    box = torch.cat([torch.cat(boxes).cpu().float(), score[:, None]], 1)
    return (pairs % num_classes).cpu()[order], box[order], torch.cat(masks)[order]


def _scaled(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits[None], tuple(size), mode="bilinear", align_corners=False)[0]


def _boxes(masks: Tensor) -> Tensor:
    """(N, 4) of masks (N, H, W): first column and row, last column and row + 1; zeros if empty."""
    spans = []
    for axis in (1, 2):  # over rows: which columns there are
        there = masks.any(axis).int()
        first, last = there.argmax(1), there.shape[1] - there.flip(1).argmax(1)
        spans.append(torch.stack([first, last], 1) * there.amax(1, keepdim=True))
    (x1, x2), (y1, y2) = (span.unbind(1) for span in spans)
    return torch.stack([x1, y1, x2, y2], 1)
