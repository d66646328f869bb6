"""What a picture is conditioned on: a label, or a prompt's features."""

import copy
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tim.checks import check_computed
from tim.data.prompts import Prompt
from tim.encoders import TextEncoder
from tim.generate import draws
from tim.generate.settings import ClassSettings, TextSettings

_log = logging.getLogger(__name__)


class Condition(NamedTuple):
    """Of one picture."""

    y: Tensor  # (1,) labels, or features (1, L, D)
    y_null: Tensor  # shaped as y: "nothing"


class Labels:
    """A class each, drawn or in turn.

    Raises:
        ValueError: more classes are asked for than the network has.
    """

    def __init__(self, settings: ClassSettings, known: int, device: torch.device):
        self._count = settings.num_classes or known
        if self._count > known:
            raise ValueError(f"num_classes must be at most the network's {known}: {self._count}")
        self._settings, self._null, self._device = settings, known, device

    def __call__(self, items: Sequence[Prompt]) -> list[Condition]:
        y_null = torch.tensor([self._null], device=self._device)
        labels = map(self._label, items)
        return [Condition(torch.tensor([y], device=self._device), y_null) for y in labels]

    def _label(self, item: Prompt) -> int:
        if self._settings.balanced:
            return int(item.name) % self._count
        return draws.label(self._settings.global_seed, item.name, self._count)


class Texts:
    """Features of prompts, cut to a number of tokens that each prompt has to itself, or as
    published to the most in its batch."""

    def __init__(self, encoder: TextEncoder, settings: TextSettings, items: Sequence[Prompt]):
        self._encoder, self._settings = copy.copy(encoder), settings
        self._encoder.escape_captions = settings.escape_captions
        lengths = self._encoder.lengths([*(item.text for item in items), ""])
        shortest = lengths.pop()
        if settings.published_padding:
            lengths = _longest_of_batches(lengths, settings.per_proc_batch_size)
        else:
            lengths = [max(length, shortest) for length in lengths]
        self._lengths = {item.name: n for item, n in zip(items, lengths, strict=True)}

    def __call__(self, items: Sequence[Prompt]) -> list[Condition]:
        texts = list(dict.fromkeys(item.text for item in items))
        at_once = 1 if self._settings.batch_invariant else len(texts)
        starts = range(0, len(texts), at_once)
        parts = [self._encoded(texts[start : start + at_once]) for start in starts]
        features = dict(zip(texts, torch.cat(parts).split(1), strict=True))
        conditions = []
        for item in items:
            length = self._lengths[item.name]
            y, y_null = features[item.text], self._encoder.nothing
            conditions.append(Condition(y[:, :length], y_null[:, :length]))
        return conditions

    def _encoded(self, texts: list[str]) -> Tensor:
        for lost in filter(None, map(self._encoder.beyond, texts)):
            _log.warning(
                "truncated to max_seq_length = %d tokens, the prompt loses %r",
                self._encoder.max_seq_length, lost,
            )  # fmt: skip
        features, _ = self._encoder.encode(texts)
        name = f"the features of {', '.join(texts)!r:.80}"
        check_computed(name, features, "the text encoder", features.dtype)
        return features


def _longest_of_batches(lengths: list[int], size: int) -> list[int]:
    """Of each list place, the most tokens in its batch; the last is filled from the beginning."""
    longest = []
    for start in range(0, len(lengths), size):
        batch = [lengths[i % len(lengths)] for i in range(start, start + size)]
        longest += [max(batch)] * size
    return longest[: len(lengths)]
