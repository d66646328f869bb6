"""Prompts, read for the network."""

import logging
from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex, overload

import torch
from torch import Tensor

from tim.checks import check_finite, whole
from tim.encoders import TextEncoder

from .base import TiMPipeline

Prompts = str | Sequence[str]
_log = logging.getLogger(__name__)


class ReadsPrompts(TiMPipeline):
    """A pipeline with `text_encoder` and `tokenizer`, or without, which then takes features."""

    @overload
    def encode_prompt(
        self, prompt: Prompts | None = ..., num_images_per_prompt: SupportsIndex = ...,
        negative_prompt: Prompts | None = ..., do_classifier_free_guidance: Literal[True] = ...,
        prompt_embeds: Tensor | None = ..., negative_prompt_embeds: Tensor | None = ...,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def encode_prompt(
        self, prompt: Prompts | None = ..., num_images_per_prompt: SupportsIndex = ...,
        negative_prompt: Prompts | None = ..., *, do_classifier_free_guidance: bool,
        prompt_embeds: Tensor | None = ..., negative_prompt_embeds: Tensor | None = ...,
    ) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: Prompts | None = None,
        num_images_per_prompt: SupportsIndex = 1,
        negative_prompt: Prompts | None = None,
        do_classifier_free_guidance: bool = True,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Features of the prompts and of the negative ones, both (B, L, cap_feat_dim).

        As the released network was trained: L is the length of the longest prompt, padding on the
        right is encoded and attended to, and "nothing", where there is no negative prompt, is the
        empty one. A negative prompt is one for all or one each; without guidance it is None. What
        this returned for one picture a prompt can be given as `prompt_embeds` and
        `negative_prompt_embeds`. A warning says what of a prompt is beyond `max_seq_length`.

        Raises:
            ValueError: prompts that are none, of another number or no text; features that are not
                finite, or of another shape than (B, L, cap_feat_dim) or each other.
        """
        count = whole("num_images_per_prompt", num_images_per_prompt, 1)
        y, longest = self._features("prompt", prompt, prompt_embeds)
        if not do_classifier_free_guidance:
            return y[:, :longest].repeat_interleave(count, dim=0), None
        if negative_prompt is None and negative_prompt_embeds is None:
            negative_prompt = ""
        y_null, length = self._features("negative_prompt", negative_prompt, negative_prompt_embeds)
        if len(y_null) not in (1, len(y)):
            raise ValueError(
                f"negative_prompt must be one or {len(y)}, as prompts are; got {len(y_null)}"
            )
        longest = max(longest, length)
        y, y_null = y[:, :longest], y_null[:, :longest].expand(len(y), -1, -1)
        if y.shape[1] != y_null.shape[1]:
            raise ValueError(
                "features of prompts and negative prompts must be of one length, got "
                f"{y.shape[1]} and {y_null.shape[1]}: encode both in one encode_prompt"
            )
        return y.repeat_interleave(count, dim=0), y_null.repeat_interleave(count, dim=0)

    def _features(
        self, name: str, prompt: Prompts | None, embeds: Tensor | None
    ) -> tuple[Tensor, int]:  # fmt: skip
        """(B, L, cap_feat_dim) and how many of the L tokens count."""
        given = self._given(name, prompt, embeds)
        if isinstance(given, list):
            return self._text_features(given)
        check_finite(f"{name}_embeds", given)
        return given.to(self._execution_device), given.shape[1]

    def _given(
        self, name: str, prompt: Prompts | None, embeds: Tensor | None
    ) -> list[str] | Tensor:  # fmt: skip
        """Texts, or their features (B, L, cap_feat_dim)."""
        if embeds is None:
            return _texts(name, prompt)
        if prompt is not None:
            raise ValueError(f"{name} and {name}_embeds were given: one of them is needed")
        width = self.transformer.config.cap_feat_dim
        is_tensor = isinstance(embeds, Tensor) and embeds.is_floating_point() and embeds.ndim == 3
        if not is_tensor or embeds.shape[2] != width or not embeds.numel():
            got = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
            raise ValueError(
                f"{name}_embeds must be floating-point (B, tokens, {width}), got {got}"
            )
        return embeds

    def _encoder(self) -> TextEncoder:
        return TextEncoder(
            self.text_encoder, self.tokenizer, self.config.max_seq_length,
            self.config.use_last_hidden_state, self.config.escape_captions,
            self.config.min_seq_length,
        )  # fmt: skip

    def _text_features(self, prompts: list[str]) -> tuple[Tensor, int]:
        """(B, max_seq_length, hidden) and how many tokens of them are read."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this pipeline has no text encoder and tokenizer: give prompt_embeds, and for "
                "guidance negative_prompt_embeds"
            )
        encoder = self._encoder()
        for lost in filter(None, map(encoder.beyond, prompts)):
            _log.warning(
                "truncated to max_seq_length = %d tokens, the prompt loses %r",
                self.config.max_seq_length, lost,
            )  # fmt: skip
        features, longest = encoder.encode(prompts, self._execution_device)
        check_finite(f"the text features in {features.dtype}", features)
        return features, longest

    def _lengths(
        self, prompt: Prompts, negative: Prompts | Tensor | None, pictures: int
    ) -> list[int]:  # fmt: skip
        """How many tokens a picture alone would read, of its prompt and what guidance leads away
        from: for each of so many pictures."""
        encoder = self._encoder()
        lengths = encoder.lengths(_texts("prompt", prompt))
        if isinstance(negative, Tensor):
            lengths = [max(length, negative.shape[1]) for length in lengths]
        elif negative is not None:
            others = encoder.lengths(_texts("negative_prompt", negative))
            lengths = list(map(max, lengths, others * (len(lengths) // len(others))))
        return [length for length in lengths for _ in range(pictures // len(lengths))]

    def _apart(
        self,
        prompt: Prompts | None,
        num_images_per_prompt: SupportsIndex,
        negative_prompt: Prompts | None,
        is_guided: bool,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """`encode_prompt` of each prompt as if it were alone: (L, cap_feat_dim) of each picture."""
        count = whole("num_images_per_prompt", num_images_per_prompt, 1)
        prompts = _rows("prompt", self._given("prompt", prompt, prompt_embeds))
        if negative_prompt is None and negative_prompt_embeds is None:
            negative_prompt = ""
        name = "negative_prompt"
        negatives = _rows(name, self._given(name, negative_prompt, negative_prompt_embeds))
        if len(negatives) not in (1, len(prompts)):
            raise ValueError(
                f"negative_prompt must be one or {len(prompts)}, as prompts are; "
                f"got {len(negatives)}"
            )
        negatives = negatives * (len(prompts) // len(negatives))
        both = [
            self.encode_prompt(
                do_classifier_free_guidance=is_guided, **of_one, **(negative if is_guided else {})
            )
            for of_one, negative in zip(prompts, negatives, strict=True)
        ]
        y = [features[0] for features, _ in both for _ in range(count)]
        if not is_guided:
            return y, None
        return y, [features[0] for _, features in both for _ in range(count)]


def _texts(name: str, given: Prompts | None) -> list[str]:
    texts = [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a text or several, got {given!r}")
    return texts


def _rows(name: str, given: list[str] | Tensor) -> list[dict[str, Any]]:
    """Each as `encode_prompt` takes it."""
    if isinstance(given, list):
        return [{name: text} for text in given]
    return [{f"{name}_embeds": row[None]} for row in given]
