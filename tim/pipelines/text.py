"""From prompts to pictures."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, SupportsIndex, overload

import diffusers
import torch
import transformers
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from tim import checkpoints, config
from tim.checks import whole
from tim.encoders import Autoencoder
from tim.encoders.text import load_model
from tim.models import TiMTransformer2DModel
from tim.sampling import SampleType

from .base import folder_of, is_of_pixels, text_settings, transport_of
from .callbacks import States, StepCallback
from .calls import INTERVAL, SCALE, Call, Generators, OutputType, Pictures, Side
from .prompts import Prompts, ReadsPrompts
from .schedule import STEPS

_log = logging.getLogger(__name__)


class TiMTextPipeline(ReadsPrompts):
    """Pictures of what prompts say, at any size.

    Components: `transformer`, a `TiMTransformer2DModel` with `cap_feat_dim`; `vae`, an
    `AutoencoderDC` or `AutoencoderKL`, or None for a network that draws pixels; `text_encoder` and
    its `tokenizer`, whose hidden size is `cap_feat_dim`, such as Gemma with or without its language
    head. `max_seq_length` tokens of a prompt are read; of the encoder, the last layer with its
    norm, or the second last without it where `use_last_hidden_state` is false. `escape_captions` is
    for a network that was trained on escaped captions, as the released one was: see
    `tim.encoders.TextEncoder`. Without `text_encoder` and `tokenizer`, calls take features in place
    of prompts. `scheduler` is one of diffusers that steps as the transport does. Shorter prompts
    are padded to `min_seq_length` tokens, for a network that has seen short texts beside longer
    ones alone.

    Raises:
        ValueError: components that do not fit each other.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "scheduler"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

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
        scheduler: SchedulerMixin | None = None,
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
        min_seq_length = whole("min_seq_length", min_seq_length, 1)
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
            scheduler=scheduler,
        )  # fmt: skip
        self._set_up(transport, transport_params)
        self.register_to_config(
            max_seq_length=max_seq_length, use_last_hidden_state=use_last_hidden_state,
            escape_captions=escape_captions, min_seq_length=min_seq_length,
        )  # fmt: skip

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        preset_or_config: str | Path = "t2i",
        *,
        dtype: torch.dtype | None = torch.bfloat16,
        vae: diffusers.ModelMixin | None = None,
        text_encoder: transformers.PreTrainedModel | None = None,
        tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    ) -> "TiMTextPipeline":
        """From a released weight file, such as "t2i_model.bin".

        `dtype` is the network's and the text encoder's, None that of the file; float16 does not
        hold the range of a text encoder, which gets bfloat16 instead. What is not given comes from
        the configuration's `model.vae_dir` (in float32 as published, tiled beyond 2560 pixels) and
        `model.text_encoder_dir`. Prompts are escaped as the released network's captions were,
        unless `model.escape_captions` is false.

        Raises:
            ValueError: see `tim.checkpoints.load`; or the configuration names no such folder.
            OSError: a folder is neither there nor to be had from the hub.
        """
        cfg = config.load(preset_or_config)
        needs_vae = vae is None and not is_of_pixels(cfg)
        vae_dir = folder_of(cfg, "vae_dir", "vae") if needs_vae else None
        is_complete = text_encoder is not None and tokenizer is not None
        text_dir = None if is_complete else folder_of(cfg, "text_encoder_dir", "text_encoder")
        transformer = checkpoints.load(path, cfg, dtype=dtype)
        text_dtype = transformer.dtype if transformer.dtype != torch.float16 else torch.bfloat16
        return cls(
            transformer,
            Autoencoder.load(vae_dir, tile=2560).model if needs_vae else vae,
            text_encoder or load_model(text_dir, text_dtype),
            tokenizer or transformers.AutoTokenizer.from_pretrained(text_dir),
            *transport_of(cfg),
            **text_settings(cfg),
        )

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
        callback_on_step_end_tensor_inputs: Sequence[str] = ...,
        sigmas: Iterable[float] | None = ..., timesteps: Iterable[float] | None = ...,
        guider: Any = ..., batch_invariant: bool = ...,
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ...,
        sigmas: Iterable[float] | None = ..., timesteps: Iterable[float] | None = ...,
        guider: Any = ..., batch_invariant: bool = ...,
    ) -> tuple[Pictures]: ...  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts | None = None,
        height: Side = None,
        width: Side = None,
        num_inference_steps: SupportsIndex = STEPS,
        guidance_scale: float = SCALE,
        guidance_interval: tuple[float, float] = INTERVAL,
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        sigmas: Iterable[float] | None = None,
        timesteps: Iterable[float] | None = None,
        guider: Any = None,
        batch_invariant: bool = False,
    ) -> ImagePipelineOutput | tuple[Pictures]:
        """Draw pictures of each prompt, those of one prompt next to each other.

        Args, beside those of `TiMClassPipeline`:
            prompt: one or several.
            negative_prompt: what guidance leads away from, one for all or one each; nothing, as
                in training, by default; without guidance it is not read, with a warning.
            num_images_per_prompt: pictures of each prompt.
            prompt_embeds, negative_prompt_embeds: in place of the prompts, what `encode_prompt`
                made of them.
            callback_on_step_end_tensor_inputs: of "latents", "prompt_embeds" and
                "negative_prompt_embeds".

        Raises:
            ValueError: prompts, sizes or options that do not fit.
            FloatingPointError: what the network or the autoencoder computes is not finite.
        """
        call = Call(
            height, width, num_inference_steps, guidance_scale, guidance_interval,
            stochasticity_ratio, sample_type, generator, latents, output_type, return_dict,
            callback_on_step_end, callback_on_step_end_tensor_inputs, sigmas, timesteps, guider,
            batch_invariant,
        )  # fmt: skip
        options = self._begin(call)
        given = prompt, num_images_per_prompt, negative_prompt
        embeds = prompt_embeds, negative_prompt_embeds
        several = isinstance(negative_prompt, (list, tuple))
        is_negative = any(negative_prompt) if several else bool(negative_prompt)
        if not call.is_guided and (is_negative or negative_prompt_embeds is not None):
            _log.warning("without guidance (guidance_scale above 1) negative prompts are not read")
        if call.batch_invariant:
            y, y_null = self._apart(*given, call.is_guided, *embeds)
            return self._generate(call, options, y, y_null)
        y, y_null = self.encode_prompt(*given, call.is_guided, *embeds)
        lengths = None
        if call.is_ragged and prompt is not None:
            negative = None
            if call.is_guided:
                negative = negative_prompt_embeds if negative_prompt is None else negative_prompt
                negative = "" if negative is None else negative
            lengths = self._lengths(prompt, negative, len(y))
        return self._generate(call, options, y, y_null, lengths)
