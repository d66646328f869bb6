"""From prompts to pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from tim import checkpoints, config
from tim.checks import check_finite
from tim.models import TiMTransformer2DModel

from .base import StepCallback, TiMPipeline, folder_of, transport_of


class TiMTextPipeline(TiMPipeline):
    """Pictures of what prompts say, at any size.

    Components: `transformer`, a `TiMTransformer2DModel` with `cap_feat_dim`; `vae`, an
    `AutoencoderDC` or `AutoencoderKL`; `text_encoder` and its `tokenizer`, whose hidden size is
    `cap_feat_dim`, such as Gemma with or without its language head. `max_seq_length` tokens of a
    prompt are read; of the encoder, the last layer with its norm, or the second last without it
    where `use_last_hidden_state` is false.

    Raises:
        ValueError: components that do not fit each other.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        transformer: TiMTransformer2DModel,
        vae: diffusers.AutoencoderDC | diffusers.AutoencoderKL,
        text_encoder: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        transport: str = "OT_FM",
        transport_params: dict[str, Any] | None = None,
        max_seq_length: int = 256,
        use_last_hidden_state: bool = True,
    ):
        super().__init__()
        needed = transformer.config.cap_feat_dim
        width = text_encoder.config.get_text_config().hidden_size
        if needed is None:
            raise ValueError("this network is conditioned on classes: use TiMClassPipeline")
        if needed != width:
            raise ValueError(
                f"the network reads text features of {needed}, the encoder has {width}"
            )
        if max_seq_length < 1:
            raise ValueError(f"max_seq_length must be at least 1, got {max_seq_length}")
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self._set_up(transport, transport_params)
        self.register_to_config(
            max_seq_length=max_seq_length, use_last_hidden_state=use_last_hidden_state
        )

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
        float32 as published) and `model.text_encoder_dir`.

        Raises:
            ValueError: see `tim.checkpoints.load`; or the configuration names no such folder.
            OSError: a folder is neither there nor to be had from the hub.
        """
        cfg = config.load(preset_or_config)
        model = cfg.model
        vae_dir = None if vae else folder_of(cfg, "vae_dir", "vae")
        is_complete = text_encoder is not None and tokenizer is not None
        text_dir = None if is_complete else folder_of(cfg, "text_encoder_dir", "text_encoder")
        text_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        return cls(
            checkpoints.load(path, cfg, dtype=dtype),
            vae or diffusers.AutoModel.from_pretrained(vae_dir),
            text_encoder or transformers.AutoModel.from_pretrained(text_dir, dtype=text_dtype),
            tokenizer or transformers.AutoTokenizer.from_pretrained(text_dir),
            *transport_of(cfg),
            max_seq_length=model.get("max_seq_length", 256),
            use_last_hidden_state=model.get("use_last_hidden_state", True),
        )

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int = 1,
        negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Features of the prompts and of the negative ones, both (B, L, cap_feat_dim).

        As the released network was trained: L is the length of the longest prompt, padding on the
        right is encoded and attended to, and "nothing", where there is no negative prompt, is the
        empty one. A negative prompt is one for all or one each; without guidance it is None.

        Raises:
            ValueError: prompts that are none, of another number or no text; features that are not
                finite.
        """
        prompts = _texts("prompt", prompt)
        if num_images_per_prompt < 1:
            raise ValueError(
                f"num_images_per_prompt must be 1 or more, got {num_images_per_prompt}"
            )
        y, longest = self._text_features(prompts)
        y_null = None
        if do_classifier_free_guidance:
            negative = _texts("negative_prompt", negative_prompt or "")
            if len(negative) not in (1, len(prompts)):
                raise ValueError(
                    f"negative_prompt must be one or {len(prompts)}, as prompts are; "
                    f"got {len(negative)}"
                )
            y_null, longest_null = self._text_features(negative)
            longest = max(longest, longest_null)
            y_null = y_null[:, :longest].expand(len(prompts), -1, -1)
            y_null = y_null.repeat_interleave(num_images_per_prompt, dim=0)
        return y[:, :longest].repeat_interleave(num_images_per_prompt, dim=0), y_null

    def _text_features(self, prompts: list[str]) -> tuple[Tensor, int]:
        """(B, max_seq_length, hidden) and how many tokens the longest prompt has."""
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.config.max_seq_length, truncation=True,
            padding_side="right", return_tensors="pt",
        )  # fmt: skip
        device = self._execution_device
        encoded = self.text_encoder(
            input_ids=tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device),
            output_hidden_states=True,
        )
        features = encoded.hidden_states[-1 if self.config.use_last_hidden_state else -2]
        check_finite(f"the text features in {features.dtype}", features)
        return features, max(1, int(tokens.attention_mask.sum(dim=1).max()))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 8,
        guidance_scale: float = 1.5,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        stochasticity_ratio: float = 0.0,
        sample_type: str = "transition",
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw pictures of each prompt, those of one prompt next to each other.

        Args, beside those of `TiMClassPipeline`:
            prompt: one or several.
            negative_prompt: what guidance leads away from, one for all or one each; nothing, as
                in training, by default.
            num_images_per_prompt: pictures of each prompt.

        Raises:
            ValueError: prompts, sizes or options that do not fit.
        """
        self._check_options(height, width, num_inference_steps, guidance_interval, output_type)
        y, y_null = self.encode_prompt(
            prompt, num_images_per_prompt, negative_prompt, guidance_scale > 1
        )
        return self._generate(
            y, y_null, height, width, num_inference_steps, guidance_scale, guidance_interval,
            stochasticity_ratio, sample_type, generator, latents, output_type, return_dict,
            callback_on_step_end,
        )  # fmt: skip


def _texts(name: str, given: str | Sequence[str]) -> list[str]:
    texts = [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a text or several, got {given!r}")
    return texts
