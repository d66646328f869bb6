"""What GenEval knows of: its classes and colours, and an object that a detector found."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# COCO's 80 in COCO's order, under GenEval's names: a detector's class is mapped by its index.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"
)  # fmt: skip


class Detection(NamedTuple):
    """An object in a picture."""

    name: str  # its class, under GenEval's name
    box: Sequence[float]  # x1, y1, x2, y2 in px
    score: float  # 0 to 1
    mask: np.ndarray | None = None  # (H, W) bool


Detector = Callable[[Image.Image], Sequence[Detection]]
# The picture, objects of one class, the class → a colour for each.
ColourClassifier = Callable[[Image.Image, Sequence[Detection], str], Sequence[str]]
Metadata = dict[str, Any]
