"""Pictures of many sizes, and the other ways to take them through a network: padded, one by one."""

from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from tim.data import TrainingSet, mnist
from tim.data.pictures import native_size
from tim.models import Packing, TiMTransformer2DModel, pack, unpack
from tim_kernels import attention
from tim_kernels.network import attentions, blocks
from tim_kernels.network.forward import prepare
from tim_kernels.network.layers import unpatchify

# Width, height and share, as ImageNet's pictures are said to be: about half are 500×375, the mean
# is about 470×390, a few have thousands of pixels. The shares are not counted from the pictures.
IMAGENET = [
    (500, 375, 0.42), (375, 500, 0.12), (500, 333, 0.08), (333, 500, 0.03), (500, 334, 0.02),
    (500, 400, 0.02), (500, 500, 0.02), (400, 300, 0.03), (300, 400, 0.01), (320, 240, 0.03),
    (640, 480, 0.03), (500, 332, 0.02), (500, 281, 0.01), (450, 338, 0.01), (350, 263, 0.01),
    (300, 225, 0.02), (250, 188, 0.02), (200, 150, 0.02), (160, 120, 0.01), (110, 80, 0.01),
    (800, 600, 0.02), (1024, 768, 0.01), (600, 800, 0.01), (1280, 960, 0.005), (1600, 1200, 0.01),
    (2048, 1536, 0.003), (2592, 1944, 0.001), (3264, 2448, 0.001),
]  # fmt: skip


def imagenet_sizes(images: int) -> np.ndarray:
    """Pixel sides (images, 2), h and w, after `tim preprocess --native`; three in ten are off the
    usual sizes, as real ones are."""
    draw = np.random.default_rng(0)
    shares = np.array([share for *_, share in IMAGENET])
    kinds = draw.choice(len(IMAGENET), images, p=shares / shares.sum())
    sides = np.array([size[:2] for size in IMAGENET])[kinds]
    is_odd = draw.random(images) < 0.3
    sides = np.where(is_odd[:, None], sides * draw.uniform(0.7, 1.2, (images, 2)), sides)
    return np.array([native_size(int(w), int(h))[::-1] for w, h in sides])


class Boxes(TrainingSet):
    """MNIST's training digits cut to their boxes, whose sides are made multiples of `unit` by the
    paper around them: 20×20, 20×14, 18×20, …"""

    names = ("image", "label")
    num_classes = mnist.NUM_CLASSES

    def __init__(self, unit: int = 2):
        images, self._labels = mnist.load("train")
        self._images = [_box(image, unit) for image in images]
        self.sizes = np.array([image.shape[1:] for image in self._images])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self._images[index], "label": self._labels[index]}


def _box(image: Tensor, unit: int) -> Tensor:
    spans = []
    for axis, side in ((2, image.shape[1]), (1, image.shape[2])):
        inked = (image > -1).any(axis)[0].nonzero().flatten()
        first, length = int(inked[0]), int(inked[-1] - inked[0]) + 1
        length = -(-length // unit) * unit
        first = min(first, side - length)
        spans.append(slice(first, first + length))
    return image[:, spans[0], spans[1]].clone()


class Padded(nn.Module):
    """A network of classes that takes packed tokens as a batch padded to the longest picture, whose
    padding is not attended to."""

    def __init__(self, network: TiMTransformer2DModel, masked: bool = True):
        super().__init__()
        self.network, self.masked = network, masked

    def forward(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor, *, packing: Packing) -> Tensor:
        network, config = self.network, self.network.config
        cu, longest = packing.segments.cu_seqlens, packing.segments.max_length
        place = torch.arange(longest, device=x.device)
        at = (cu[:-1, None] + place).clamp_max(len(x) - 1)
        is_token = place < cu.diff()[:, None]  # (S, longest)
        tokens = network.x_embedder(x[at.flatten()]).view(*at.shape, -1)
        c, delta, _, rows, final = prepare(network, t, r, y, new_condition=config.new_condition)
        rope, pending = attentions.Rope(None, config.rope_order, packing.grids), None
        mask = dict(key_mask=is_token) if self.masked else {}
        with patch.object(attentions, "attention", partial(attention, **mask)):
            for block, own in zip(network.blocks, rows, strict=True):
                tokens, pending = block(tokens, pending, c, delta, None, rope, own)
        out = blocks.final_layer(network.final_layer, tokens, c, pending, final)
        owner = packing.spread(torch.arange(len(packing), device=x.device))
        out = out[owner, torch.arange(len(x), device=x.device) - cu[owner]]
        return unpatchify(out.unflatten(0, (-1, 1)), (1, 1), config.patch_size)


class OneByOne(nn.Module):
    """A network that takes packed tokens a picture at a time."""

    def __init__(self, network: TiMTransformer2DModel):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor, *, packing: Packing) -> Tensor:
        pictures = zip(unpack(x, packing), t.split(1), r.split(1), y.split(1), strict=True)
        outs = [self.network(x[None], *others)[0] for x, *others in pictures]
        return pack(outs, x.shape[-1])[0]
