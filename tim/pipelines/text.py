"""From prompts to pictures."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, SupportsIndex, overload

import diffusers
import torch
import transformers
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from tim import checkpoints, config
from tim.checks import check_finite, whole
from tim.encoders import Autoencoder, TextEncoder
from tim.encoders.text import load_model
from tim.models import TiMTransformer2DModel
from tim.sampling import SampleType

from .base import (
    Generators,
    OutputType,
    Pictures,
    Side,
    States,
    StepCallback,
    TiMPipeline,
    folder_of,
    is_of_pixels,
    is_several,
    transport_of,
)

Prompts = str | Sequence[str]
_log = logging.getLogger(__name__)


class TiMTextPipeline(TiMPipeline):
    """Pictures of what prompts say, at any size.

    Components: `transformer`, a `TiMTransformer2DModel` with `cap_feat_dim`; `vae`, an
    `AutoencoderDC` or `AutoencoderKL`, or None for a network that draws pixels; `text_encoder` and
    its `tokenizer`, whose hidden size is `cap_feat_dim`, such as Gemma with or without its language
    head. `max_seq_length` tokens of a prompt are read; of the encoder, the last layer with its
    norm, or the second last without it where `use_last_hidden_state` is false. `escape_captions` is
    for a network that was trained on escaped captions, as the released one was: see
    `tim.encoders.TextEncoder`. Without `text_encoder` and `tokenizer`, calls take features in place
    of prompts. Shorter prompts are padded to `min_seq_length` tokens, for a network that has seen
    short texts beside longer ones alone.

    Raises:
        ValueError: components that do not fit each other.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: TiMTransformer2DModel,
        vae: diffusers.AutoencoderDC | diffusers.AutoencoderKL | None = None,
        text_encoder: transformers.PreTrainedModel | None = None,
        tokenizer: transformers.PreTrainedTokenizerBase | None = None,
        transport: str = "OT_FM",
        transport_params: dict[str, Any] | None = None,
        max_seq_length: int = 256,
        use_last_hidden_state: bool = True,
        escape_captions: bool = False,
        min_seq_length: int = 1,
    ):
        super().__init__()
        needed = transformer.config.cap_feat_dim
        if needed is None:
            raise ValueError("this network is conditioned on classes: use TiMClassPipeline")
        if text_encoder is not None:
            width = text_encoder.config.get_text_config().hidden_size
            if needed != width:
                raise ValueError(
                    f"the network reads text features of {needed}, the encoder has {width}"
                )
        max_seq_length = whole("max_seq_length", max_seq_length, 1)
        if whole("min_seq_length", min_seq_length, 1) > max_seq_length:
            raise ValueError(
                f"min_seq_length must be at most max_seq_length = {max_seq_length}, got "
                f"{min_seq_length}"
            )
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self._set_up(transport, transport_params)
        self.register_to_config(
            max_seq_length=max_seq_length, use_last_hidden_state=use_last_hidden_state,
            escape_captions=escape_captions,
            min_seq_length=int(min_seq_length),
        )  # fmt: skip

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        preset_or_config: str | Path = "t2i",
        *,
        dtype: torch.dtype = torch.bfloat16,
        vae: diffusers.ModelMixin | None = None,
        text_encoder: transformers.PreTrainedModel | None = None,
        tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    ) -> "TiMTextPipeline":
        """From a released weight file, such as "t2i_model.bin".

        `dtype` is the network's and the text encoder's, whose range float16 does not hold: it gets
        bfloat16 instead. What is not given comes from the configuration's `model.vae_dir` (in
        float32 as published, tiled beyond 2560 pixels) and `model.text_encoder_dir`. Prompts are
        escaped as the released network's captions were, unless `model.escape_captions` is false.

        Raises:
            ValueError: see `tim.checkpoints.load`; or the configuration names no such folder.
            OSError: a folder is neither there nor to be had from the hub.
        """
        cfg = config.load(preset_or_config)
        model = cfg.model
        needs_vae = vae is None and not is_of_pixels(cfg)
        vae_dir = folder_of(cfg, "vae_dir", "vae") if needs_vae else None
        is_complete = text_encoder is not None and tokenizer is not None
        text_dir = None if is_complete else folder_of(cfg, "text_encoder_dir", "text_encoder")
        text_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        return cls(
            checkpoints.load(path, cfg, dtype=dtype),
            Autoencoder.load(vae_dir, tile=2560).model if needs_vae else vae,
            text_encoder or load_model(text_dir, text_dtype),
            tokenizer or transformers.AutoTokenizer.from_pretrained(text_dir),
            *transport_of(cfg),
            max_seq_length=model.get("max_seq_length", 256),
            use_last_hidden_state=model.get("use_last_hidden_state", True),
            escape_captions=model.get("escape_captions", True),
        )

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
        if embeds is None:
            return self._text_features(_texts(name, prompt))
        if prompt is not None:
            raise ValueError(f"{name} and {name}_embeds were given: one of them is needed")
        width = self.transformer.config.cap_feat_dim
        is_tensor = isinstance(embeds, Tensor) and embeds.is_floating_point() and embeds.ndim == 3
        if not is_tensor or embeds.shape[2] != width or not embeds.numel():
            got = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
            raise ValueError(
                f"{name}_embeds must be floating-point (B, tokens, {width}), got {got}"
            )
        check_finite(f"{name}_embeds", embeds)
        return embeds.to(self._execution_device), embeds.shape[1]

    def _encoder(self) -> TextEncoder:
        return TextEncoder(
            self.text_encoder, self.tokenizer, self.config.max_seq_length,
            self.config.use_last_hidden_state, self.config.escape_captions,
        )  # fmt: skip

    def _text_features(self, prompts: list[str]) -> tuple[Tensor, int]:
        """(B, max_seq_length, hidden) and how many tokens of them the network reads."""
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
        return features, max(longest, self.config.min_seq_length)

    @overload
    def __call__(
        self, prompt: Prompts | None = ..., height: Side = ..., width: Side = ...,
        num_inference_steps: SupportsIndex = ...,
        guidance_scale: float = ..., guidance_interval: tuple[float, float] = ...,
        negative_prompt: Prompts | None = ..., num_images_per_prompt: SupportsIndex = ...,
        stochasticity_ratio: float = ..., sample_type: SampleType = ...,
        generator: Generators | None = ..., latents: States | None = ...,
        output_type: OutputType = ..., return_dict: Literal[True] = ...,
        callback_on_step_end: StepCallback | None = ..., prompt_embeds: Tensor | None = ...,
        negative_prompt_embeds: Tensor | None = ...,
    ) -> ImagePipelineOutput: ...  # fmt: skip

    @overload
    def __call__(
        self, prompt: Prompts | None = ..., height: Side = ..., width: Side = ...,
        num_inference_steps: SupportsIndex = ...,
        guidance_scale: float = ..., guidance_interval: tuple[float, float] = ...,
        negative_prompt: Prompts | None = ..., num_images_per_prompt: SupportsIndex = ...,
        stochasticity_ratio: float = ..., sample_type: SampleType = ...,
        generator: Generators | None = ..., latents: States | None = ...,
        output_type: OutputType = ..., *, return_dict: Literal[False],
        callback_on_step_end: StepCallback | None = ..., prompt_embeds: Tensor | None = ...,
        negative_prompt_embeds: Tensor | None = ...,
    ) -> tuple[Pictures]: ...  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts | None = None,
        height: Side = None,
        width: Side = None,
        num_inference_steps: SupportsIndex = 8,
        guidance_scale: float = 1.5,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_prompt: Prompts | None = None,
        num_images_per_prompt: SupportsIndex = 1,
        stochasticity_ratio: float = 0.0,
        sample_type: SampleType = "transition",
        generator: Generators | None = None,
        latents: States | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> ImagePipelineOutput | tuple[Pictures]:
        """Draw pictures of each prompt, those of one prompt next to each other.

        Args, beside those of `TiMClassPipeline`:
            prompt: one or several.
            negative_prompt: what guidance leads away from, one for all or one each; nothing, as
                in training, by default.
            num_images_per_prompt: pictures of each prompt.
            prompt_embeds, negative_prompt_embeds: in place of the prompts, what `encode_prompt`
                made of them.

        Raises:
            ValueError: prompts, sizes or options that do not fit.
            FloatingPointError: what the network or the autoencoder computes is not finite.
        """
        self._check_options(height, width, num_inference_steps, guidance_interval, output_type)
        y, y_null = self.encode_prompt(
            prompt, num_images_per_prompt, negative_prompt,
            do_classifier_free_guidance=guidance_scale > 1, prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )  # fmt: skip
        lengths = None
        if (is_several(height) or is_several(width)) and prompt is not None:
            negative = None
            if guidance_scale > 1:
                negative = negative_prompt_embeds if negative_prompt is None else negative_prompt
                negative = "" if negative is None else negative
            lengths = self._lengths(prompt, negative, len(y))
        return self._generate(
            y, y_null, height, width, num_inference_steps, guidance_scale, guidance_interval,
            stochasticity_ratio, sample_type, generator, latents, output_type, return_dict,
            callback_on_step_end, lengths,
        )  # fmt: skip

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
        least = self.config.min_seq_length
        return [max(each, least) for each in lengths for _ in range(pictures // len(lengths))]


def _texts(name: str, given: Prompts | None) -> list[str]:
    texts = [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a text or several, got {given!r}")
    return texts
