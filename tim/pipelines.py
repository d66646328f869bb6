"""Diffusers pipelines around the network: from a label or a prompt to pictures.

Their module path is stored in every saved `model_index.json`: it stays.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from tim import checkpoints, config
from tim.models import TiMTransformer2DModel
from tim.sampling import sample
from tim.transports import TRANSPORTS, make

StepCallback = Callable[[DiffusionPipeline, int, float, dict[str, Tensor]], dict[str, Tensor]]


class _TiMPipeline(DiffusionPipeline):
    """What both pipelines share; components are `transformer`, `vae` and those of the text."""

    def _set_up(self, transport: str, transport_params: Mapping[str, Any] | None) -> None:
        params = dict(transport_params or {})
        self._transport = make(transport, **params)
        self.register_to_config(transport=transport, transport_params=params)
        vae = self.vae.config
        blocks = vae.get("encoder_block_out_channels") or vae["block_out_channels"]
        self.vae_scale_factor = 2 ** (len(blocks) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        if vae["latent_channels"] != self.transformer.config.in_channels:
            raise ValueError(
                f"the autoencoder has {vae['latent_channels']} latent channels, "
                f"the network {self.transformer.config.in_channels}"
            )

    def _generate(
        self, y: Tensor, y_null: Tensor | None, height: int | None, width: int | None,
        num_inference_steps: int, guidance_scale: float, guidance_interval: tuple[float, float],
        stochasticity_ratio: float, sample_type: str,
        generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None,
        output_type: str, return_dict: bool, callback_on_step_end: StepCallback | None,
    ) -> ImagePipelineOutput | tuple:  # fmt: skip
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        z = self._initial_noise(len(y), height, width, generator, latents)
        with self.progress_bar(total=num_inference_steps) as bar:

            def on_step(step: int, time: float, state: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return state
                changed = callback_on_step_end(self, step, time, {"latents": state}) or {}
                return changed.get("latents", state)

            x = sample(
                self.transformer, self._transport, z, y, y_null, num_steps=num_inference_steps,
                cfg_scale=guidance_scale, cfg_low=guidance_interval[0],
                cfg_high=guidance_interval[1], stochasticity_ratio=stochasticity_ratio,
                sample_type=sample_type, generator=generator, on_step=on_step,
            )  # fmt: skip
        images = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _initial_noise(self, batch: int, height, width, generator, latents) -> Tensor:
        network, factor = self.transformer.config, self.vae_scale_factor
        size = [network.input_size * factor if n is None else n for n in (height, width)]
        if any(n < 1 or n % (factor * network.patch_size) for n in size):
            raise ValueError(
                f"height and width must be multiples of {factor * network.patch_size}, "
                f"got {size[0]}×{size[1]}"
            )
        shape = (batch, network.in_channels, *(n // factor for n in size))
        if latents is None:
            return randn_tensor(shape, generator, self._execution_device, torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
        return latents.to(self._execution_device)

    def _decode(self, x: Tensor, output_type: str):
        images = self.vae.decode(x.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return self.image_processor.postprocess(images.float(), output_type)


class TiMClassPipeline(_TiMPipeline):
    """Pictures of ImageNet classes, or whichever a class-conditioned network was trained on.

    Components: `transformer`, a `TiMTransformer2DModel` without `cap_feat_dim`; `vae`, an
    `AutoencoderKL` or `AutoencoderDC`. `transport` is a published name such as "OT_FM".

    Raises:
        ValueError: components that do not fit each other.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: TiMTransformer2DModel,
        vae: diffusers.AutoencoderKL | diffusers.AutoencoderDC,
        transport: str = "OT_FM",
        transport_params: dict[str, Any] | None = None,
    ):
        super().__init__()
        if transformer.config.cap_feat_dim is not None:
            raise ValueError("this network is conditioned on text: use TiMTextPipeline")
        self.register_modules(transformer=transformer, vae=vae)
        self._set_up(transport, transport_params)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        preset_or_config: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        vae: diffusers.ModelMixin | None = None,
    ) -> "TiMClassPipeline":
        """From a released weight file, such as ("c2i_model_256.safetensors", "xl-256").

        `dtype` is the network's. The autoencoder is `model.vae_dir` of the configuration, in
        float32 as published, unless given.

        Raises:
            ValueError: see `tim.checkpoints.load`.
            OSError: `vae_dir` is neither a folder nor to be had from the hub.
        """
        cfg = config.load(preset_or_config)
        transformer = checkpoints.load(path, cfg, dtype=dtype)
        vae = vae or diffusers.AutoModel.from_pretrained(cfg.model.vae_dir)
        return cls(transformer, vae, *_transport_of(cfg))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 8,
        guidance_scale: float = 1.5,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        stochasticity_ratio: float = 0.0,
        sample_type: str = "transition",
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw a picture of each class.

        Args:
            class_labels: one label or several, B in all.
            height, width: of the pictures, pixels; the network's training size by default.
            num_inference_steps: network evaluations, two each where guidance acts.
            guidance_scale: classifier-free guidance (arXiv 2207.12598); 1 is none.
            guidance_interval: guidance acts where low·T_max < t < high·T_max; as published, not on
                the first step of a `high` of 1.
            stochasticity_ratio, sample_type: see `tim.sampling.sample`.
            generator: of the initial noise and of a stochastic sampler's.
            latents: the initial noise itself, (B, in_channels, height/f, width/f), where the
                autoencoder shrinks by f.
            output_type: "pil", "np", "pt", or "latent" for what the autoencoder would decode.
            return_dict: an `ImagePipelineOutput`, else a tuple of the pictures.
            callback_on_step_end: called as (pipeline, step, time reached, {"latents": state}) after
                each step; the latents that it returns, if any, go on.

        Raises:
            ValueError: labels, sizes or options that do not fit.
        """
        y = torch.as_tensor(class_labels).reshape(-1)
        y_null = None
        if guidance_scale > 1:
            if not self.transformer.config.class_dropout_prob > 0:
                raise ValueError(
                    f"guidance (guidance_scale = {guidance_scale}) needs a network with the label "
                    "of no class: it was trained with class_dropout_prob = 0"
                )
            y_null = torch.full_like(y, self.transformer.config.num_classes)
        self.transformer.y_embedder.check(y, len(y))  # where reading labels costs no wait
        y, y_null = (None if v is None else v.to(self._execution_device) for v in (y, y_null))
        return self._generate(
            y, y_null, height, width, num_inference_steps, guidance_scale, guidance_interval,
            stochasticity_ratio, sample_type, generator, latents, output_type, return_dict,
            callback_on_step_end,
        )  # fmt: skip


class TiMTextPipeline(_TiMPipeline):
    """Pictures of what prompts say, at any size.

    Components: `transformer`, a `TiMTransformer2DModel` with `cap_feat_dim`; `vae`, an
    `AutoencoderDC` or `AutoencoderKL`; `text_encoder` and its `tokenizer`, whose hidden size is
    `cap_feat_dim`. `max_seq_length` tokens of a prompt are read; of the encoder, the last layer
    with its norm, or the second last without it where `use_last_hidden_state` is false.

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
        needed, width = transformer.config.cap_feat_dim, text_encoder.config.hidden_size
        if needed is None:
            raise ValueError("this network is conditioned on classes: use TiMClassPipeline")
        if needed != width:
            raise ValueError(
                f"the network reads text features of {needed}, the encoder has {width}"
            )
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

        `dtype` is the network's and the text encoder's. What is not given comes from the
        configuration's `model.vae_dir` (in float32 as published) and `model.text_encoder_dir`.

        Raises:
            ValueError: see `tim.checkpoints.load`.
            OSError: a folder is neither there nor to be had from the hub.
        """
        cfg = config.load(preset_or_config)
        transformer, model = checkpoints.load(path, cfg, dtype=dtype), cfg.model
        return cls(
            transformer,
            vae or diffusers.AutoModel.from_pretrained(model.vae_dir),
            text_encoder
            or transformers.AutoModel.from_pretrained(model.text_encoder_dir, dtype=dtype),
            tokenizer or transformers.AutoTokenizer.from_pretrained(model.text_encoder_dir),
            *_transport_of(cfg),
            max_seq_length=model.get("max_seq_length", 256),
            use_last_hidden_state=model.get("use_last_hidden_state", True),
        )

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | Sequence[str], num_images_per_prompt: int = 1, negative_prompt: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Features of the prompts and of the negative one, both (B, L, cap_feat_dim).

        As the released network was trained: L is the length of the longest prompt, padding on the
        right is encoded and attended to, and "nothing" is the empty prompt cut to the same length.

        Raises:
            ValueError: no prompt, or no pictures.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or num_images_per_prompt < 1:
            raise ValueError(
                "one prompt and one image each are the least, "
                f"got {len(prompts)} and {num_images_per_prompt}"
            )
        features, longest = self._text_features(prompts)
        null, _ = self._text_features([negative_prompt])
        y = features[:, :longest].repeat_interleave(num_images_per_prompt, dim=0)
        return y, null[:, :longest].expand_as(y)

    def _text_features(self, prompts: list[str]) -> tuple[Tensor, int]:
        """(B, max_seq_length, hidden) and how many tokens the longest prompt has."""
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.config.max_seq_length, truncation=True,
            padding_side="right", return_tensors="pt",
        )  # fmt: skip
        is_last = self.config.use_last_hidden_state
        device = self._execution_device
        encoded = self.text_encoder(
            input_ids=tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device),
            output_hidden_states=not is_last,
        )
        features = encoded.last_hidden_state if is_last else encoded.hidden_states[-2]
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
        negative_prompt: str = "",
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
            negative_prompt: what guidance leads away from; nothing, as in training.
            num_images_per_prompt: pictures of each prompt.

        Raises:
            ValueError: prompts, sizes or options that do not fit.
        """
        y, y_null = self.encode_prompt(prompt, num_images_per_prompt, negative_prompt)
        return self._generate(
            y, y_null, height, width, num_inference_steps, guidance_scale, guidance_interval,
            stochasticity_ratio, sample_type, generator, latents, output_type, return_dict,
            callback_on_step_end,
        )  # fmt: skip


def _transport_of(cfg: DictConfig) -> tuple[str, dict[str, Any]]:
    """The published name of a configuration's transport, and its parameters."""
    cls = type(config.build_transport(cfg))
    name = next(name for name, known in TRANSPORTS.items() if known is cls)
    return name, OmegaConf.to_container(cfg.model.transport.get("params") or OmegaConf.create())
