"""Prompts to features."""

import functools
import os.path
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import ModelOutput

from tim.captions import escaped
from tim.checks import whole

_forward = threading.Lock()  # hooks are of the module, not of a thread


class TextEncoder:
    """Features of texts as the released text network was trained on.

    Plain texts without a chat template, padded on the right to `max_seq_length` tokens; the
    network is told of no mask and attends to padding. There, flash attention gives zero, whatever
    the prompt, and so does this encoder with any attention: what enters a layer's
    `self_attn.o_proj` is zeroed. Encoders without such layers, T5's, stay as they are.

    Args:
        model: such as Gemma 3, with or without its language head, or a T5 encoder.
        tokenizer: the model's.
        max_seq_length: tokens of a text that are read.
        use_last_hidden_state: the last layer with its norm, else the second last without it.
        escape_captions: texts go through `tim.captions.escaped` first, as those did that the
            released network was trained on.
        min_seq_length: tokens of a shorter text, with padding: for a network that has seen short
            texts beside longer ones alone.

    Example::

        encode = TextEncoder.load("google/gemma-3-1b-it", escape_captions=True)
        y = encode(["a red fox", "a café"])  # (2, L, 1152), L the tokens of the longest
        y_null = encode.nothing[:, : y.shape[1]]
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        max_seq_length: int = 256,
        use_last_hidden_state: bool = True,
        escape_captions: bool = False,
        min_seq_length: int = 1,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_seq_length = whole("max_seq_length", max_seq_length, 1)
        self.min_seq_length = whole("min_seq_length", min_seq_length, 1)
        if self.min_seq_length > self.max_seq_length:
            raise ValueError(
                f"min_seq_length must be at most max_seq_length = {max_seq_length}, got "
                f"{min_seq_length}"
            )
        self.use_last_hidden_state = use_last_hidden_state
        if not isinstance(escape_captions, bool):
            raise ValueError(f"escape_captions must be true or false, got {escape_captions!r}")
        self.escape_captions = escape_captions

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        max_seq_length: int = 256,
        use_last_hidden_state: bool = True,
        escape_captions: bool = False,
        min_seq_length: int = 1,
    ) -> "TextEncoder":
        """From a folder or the hub, in eval mode; of T5 the encoder alone.

        Raises:
            OSError: it is neither a folder nor to be had from the hub.
        """
        model = load_model(folder, dtype).to(device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return cls(
            model, tokenizer, max_seq_length, use_last_hidden_state, escape_captions, min_seq_length
        )

    @property
    def width(self) -> int:
        """Of the features; a network's `cap_feat_dim`."""
        return self.model.config.get_text_config().hidden_size

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Features (B, L, width), L the tokens of the longest text."""
        features, longest = self.encode(texts)
        return features[:, :longest]

    @functools.cached_property
    def nothing(self) -> Tensor:
        """Of the empty text, (1, max_seq_length, width); computed once."""
        return self.encode([""])[0]

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], device: torch.device | str | None = None
    ) -> tuple[Tensor, int]:
        """Features (B, max_seq_length, width) and how many tokens of the longest text are read.

        `device` is where the model computes, its own by default.

        Raises:
            ValueError: these are no texts; or the model was compiled and called before.
        """
        tokens = self._tokens(texts, return_tensors="pt")
        longest = max(self.min_seq_length, int(tokens.attention_mask.sum(dim=1).max()))
        device = self.model.device if device is None else device
        ids, mask = (
            tokens[name].to(device, non_blocking=True) for name in ("input_ids", "attention_mask")
        )
        # A language head's output has no last_hidden_state.
        needs_all = not self.use_last_hidden_state or self.model.get_output_embeddings() is not None
        encoded = _without_padding(
            self.model, input_ids=ids, attention_mask=mask, output_hidden_states=needs_all
        )
        if not needs_all:
            return encoded.last_hidden_state, longest
        return encoded.hidden_states[-1 if self.use_last_hidden_state else -2], longest

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens of each are read, `min_seq_length` or more."""
        return [max(self.min_seq_length, sum(mask)) for mask in self._tokens(texts).attention_mask]

    def beyond(self, text: str) -> str:
        """What of a text is not read."""
        (read,) = self._tokens([text]).input_ids
        ids = self.tokenizer(self._prepared(text), verbose=False).input_ids
        lost = ids[len(os.path.commonprefix([ids, read])) :] if len(ids) > len(read) else []
        return self.tokenizer.decode(lost, skip_special_tokens=True)

    def _tokens(self, texts: Sequence[str], **options: str) -> transformers.BatchEncoding:
        is_several = not isinstance(texts, str) and len(texts)
        if not is_several or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts must be a list of texts, got {texts!r}")
        return self.tokenizer(
            list(map(self._prepared, texts)), padding="max_length", truncation=True,
            max_length=self.max_seq_length, padding_side="right", return_attention_mask=True,
            **options,
        )  # fmt: skip

    def _prepared(self, text: str) -> str:
        return escaped(text) if self.escape_captions else text


class KeptFeatures:
    """`encoder` with the features of each text kept, for captions that come again and again.

    They are held in host memory: max_seq_length · width numbers a text.
    """

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder
        self._kept: dict[str, tuple[Tensor, int]] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """As the encoder's."""
        for text in texts:
            if text not in self._kept:
                features, length = self.encoder.encode([text])
                self._kept[text] = features[0].cpu(), length
        features, lengths = zip(*map(self._kept.__getitem__, texts), strict=True)
        return torch.stack(features)[:, : max(lengths)].to(self.encoder.model.device)


def load_model(folder: str | Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A decoder without its language head, or the encoder of an encoder-decoder (T5)."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except OSError as error:
        raise OSError(
            f"the text encoder {folder} is neither a folder of one nor to be had from the hub"
        ) from error
    is_encoder = config.is_encoder_decoder or "t5" in config.model_type
    kind = "AutoModelForTextEncoding" if is_encoder else "AutoModel"
    return getattr(transformers, kind).from_pretrained(folder, dtype=dtype)


def _without_padding(model: nn.Module, **inputs: Tensor | bool) -> ModelOutput:
    """The model's output, attention zero at padded queries as flash attention's is."""
    is_padding = (inputs["attention_mask"] == 0)[..., None]
    seen = []

    def zero_padding(layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(layer)
        return (args[0].masked_fill(is_padding, 0),)

    layers = [m for name, m in model.named_modules() if name.endswith("self_attn.o_proj")]
    with _forward:
        hooks = [layer.register_forward_pre_hook(zero_padding) for layer in layers]
        try:
            encoded = model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
    if len(seen) != len(layers):
        raise ValueError(
            f"{len(layers) - len(seen)} of {len(layers)} layers of the text encoder run without "
            "hooks, as in one that was compiled and called before: give it as it was loaded"
        )
    return encoded
