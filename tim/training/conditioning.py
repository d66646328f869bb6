"""What the network is told about a batch: a class or a text, dropped now and then.

A batch is a mapping, of tensors on the device and of lists: `label` (B,), `caption` [B texts],
`latent` (B, C, h, w), `image` (B, 3, H, W) in [-1, 1].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tim.training.draws import Draws

Batch = Mapping[str, Any]
TextEncoder = Callable[[list[str]], Tensor]  # B texts → (B, L, D), L the longest's tokens


class Condition(NamedTuple):
    """y of a batch, three times."""

    y: Tensor  # what the network trains on, some of it dropped
    y_null: Tensor  # "nothing"
    y_ema: Tensor  # what the averaged network sees, for an enhanced target


class Conditioning(Protocol):
    """Makes a batch's condition; all chance comes from `draws`."""

    def __call__(self, batch: Batch, draws: Draws) -> Condition: ...

    def examples(self, device: torch.device) -> tuple[Tensor, list[str]]:
        """y of a few samples to look at while training, and their names."""


class ClassConditioning:
    """`label`, replaced by `num_classes` with probability `dropout`.

    The averaged network sees the labels before dropping, as published.
    """

    def __init__(self, num_classes: int, dropout: float, shown: int = 10):
        self.num_classes, self.dropout, self.shown = num_classes, dropout, shown

    def __call__(self, batch: Batch, draws: Draws) -> Condition:
        label = batch["label"]
        y_null = torch.full_like(label, self.num_classes)
        is_dropped = torch.rand(len(label), generator=draws.device, device=label.device)
        return Condition(torch.where(is_dropped < self.dropout, y_null, label), y_null, label)

    def examples(self, device: torch.device) -> tuple[Tensor, list[str]]:
        y = torch.arange(min(self.shown, self.num_classes), device=device)
        return y, [str(label) for label in range(len(y))]


class TextConditioning:
    """`caption`, replaced by the empty text with probability `proportion_empty`, encoded.

    `nothing` (1, L_max, D) is the empty text at full length; it is cut to the length of the batch.
    The averaged network sees what the network sees, as published. `shown` are texts to look at.
    """

    def __init__(
        self,
        encode: TextEncoder,
        nothing: Tensor,
        proportion_empty: float,
        shown: Sequence[str] = ("a red fox in the snow", "a bowl of fruit", "a house by a lake"),
    ):
        self.encode, self.nothing = encode, nothing
        self.proportion_empty, self.shown = proportion_empty, list(shown)

    def __call__(self, batch: Batch, draws: Draws) -> Condition:
        captions = batch["caption"]
        is_empty = torch.rand(len(captions), generator=draws.host) < self.proportion_empty
        kept = ["" if e else c for e, c in zip(is_empty.tolist(), captions, strict=True)]
        y, y_null = self._encoded(kept)
        return Condition(y, y_null, y)

    def examples(self, device: torch.device) -> tuple[Tensor, list[str]]:
        return self._encoded(self.shown)[0].to(device), self.shown

    @torch.no_grad()
    def _encoded(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        y = self.encode(texts).float()
        nothing = self.nothing[:, : y.shape[1]].to(y.device, y.dtype)
        return y, nothing.expand(len(y), -1, -1)
