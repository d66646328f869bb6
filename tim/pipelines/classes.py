"""From class labels to pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, SupportsIndex, overload

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from tim import checkpoints, config
from tim.checks import whole
from tim.encoders import Autoencoder
from tim.models import TiMTransformer2DModel
from tim.sampling import SampleType

from .base import TiMPipeline, folder_of, is_of_pixels, transport_of
from .callbacks import States, StepCallback
from .calls import INTERVAL, SCALE, Call, Generators, OutputType, Pictures, Side
from .schedule import STEPS

Labels = SupportsIndex | Sequence[SupportsIndex]


class TiMClassPipeline(TiMPipeline):
    """Pictures of ImageNet classes, or whichever a class-conditioned network was trained on.

    Components: `transformer`, a `TiMTransformer2DModel` without `cap_feat_dim`; `vae`, an
    `AutoencoderKL` or `AutoencoderDC`, or None for a network that draws pixels. `transport` is a
    published name such as "OT_FM", and `scheduler` one of diffusers that steps as it does.

    Raises:
        ValueError: components that do not fit each other.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "scheduler"]
    _callback_tensor_inputs = ["latents", "class_labels", "negative_class_labels"]

    def __init__(
        self,
        transformer: TiMTransformer2DModel,
        vae: diffusers.AutoencoderKL | diffusers.AutoencoderDC | None = None,
        transport: str = "OT_FM",  # not Literal: diffusers reads the annotation
        transport_params: dict[str, Any] | None = None,
        scheduler: SchedulerMixin | None = None,
    ):
        super().__init__()
        if transformer.config.cap_feat_dim is not None:
            raise ValueError("this network is conditioned on text: use TiMTextPipeline")
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self._set_up(transport, transport_params)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        preset_or_config: str | Path,
        *,
        dtype: torch.dtype | None = torch.bfloat16,
        vae: diffusers.ModelMixin | None = None,
    ) -> "TiMClassPipeline":
        """From a released weight file, such as ("c2i_model_256.safetensors", "xl-256").

        `dtype` is the network's, None that of the file. The autoencoder is `model.vae_dir` of the
        configuration, in float32 as published, unless given.

        Raises:
            ValueError: see `tim.checkpoints.load`; or the configuration names no `vae_dir`.
            OSError: `vae_dir` is neither a folder nor to be had from the hub.
        """
        cfg = config.load(preset_or_config)
        needs_vae = vae is None and not is_of_pixels(cfg)
        vae_dir = folder_of(cfg, "vae_dir", "vae") if needs_vae else None
        transformer = checkpoints.load(path, cfg, dtype=dtype)
        vae = Autoencoder.load(vae_dir).model if needs_vae else vae
        return cls(transformer, vae, *transport_of(cfg))

    @overload
    def __call__(
        self, class_labels: Labels, height: Side = ..., width: Side = ...,
        num_inference_steps: SupportsIndex = ...,
        guidance_scale: float = ..., guidance_interval: tuple[float, float] = ...,
        stochasticity_ratio: float = ..., sample_type: SampleType = ...,
        generator: Generators | None = ..., latents: States | None = ...,
        output_type: OutputType = ..., return_dict: Literal[True] = ...,
        callback_on_step_end: StepCallback | None = ...,
        callback_on_step_end_tensor_inputs: Sequence[str] = ...,
        sigmas: Iterable[float] | None = ..., timesteps: Iterable[float] | None = ...,
        guider: Any = ..., batch_invariant: bool = ...,
    ) -> ImagePipelineOutput: ...  # fmt: skip

    @overload
    def __call__(
        self, class_labels: Labels, height: Side = ..., width: Side = ...,
        num_inference_steps: SupportsIndex = ...,
        guidance_scale: float = ..., guidance_interval: tuple[float, float] = ...,
        stochasticity_ratio: float = ..., sample_type: SampleType = ...,
        generator: Generators | None = ..., latents: States | None = ...,
        output_type: OutputType = ..., *, return_dict: Literal[False],
        callback_on_step_end: StepCallback | None = ...,
        callback_on_step_end_tensor_inputs: Sequence[str] = ...,
        sigmas: Iterable[float] | None = ..., timesteps: Iterable[float] | None = ...,
        guider: Any = ..., batch_invariant: bool = ...,
    ) -> tuple[Pictures]: ...  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
        height: Side = None,
        width: Side = None,
        num_inference_steps: SupportsIndex = STEPS,
        guidance_scale: float = SCALE,
        guidance_interval: tuple[float, float] = INTERVAL,
        stochasticity_ratio: float = 0.0,
        sample_type: SampleType = "transition",
        generator: Generators | None = None,
        latents: States | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        sigmas: Iterable[float] | None = None,
        timesteps: Iterable[float] | None = None,
        guider: Any = None,
        batch_invariant: bool = False,
    ) -> ImagePipelineOutput | tuple[Pictures]:
        """Draw a picture of each class.

        Args:
            class_labels: one label or several, B in all.
            height, width: of the pictures, pixels; the network's training size by default. Lists
                are of each picture, which then is as if it were alone; `latents` and what is
                returned are lists, too.
            num_inference_steps: network evaluations, two each where guidance acts.
            guidance_scale: classifier-free guidance (arXiv 2207.12598); 1 is none.
            guidance_interval: guidance acts where low·T_max < t < high·T_max; as published, not on
                the first step of a `high` of 1.
            stochasticity_ratio, sample_type: see `tim.sampling.sample`.
            generator: of the initial noise and of a stochastic sampler's; or one a picture.
            latents: the initial noise itself, of variance 1, (B, in_channels, height/f, width/f),
                where the autoencoder shrinks by f.
            output_type: "pil", "np", "pt", or "latent" for what the autoencoder would decode.
            return_dict: an `ImagePipelineOutput`, else a tuple of the pictures.
            callback_on_step_end: called as (pipeline, step, time reached, {"latents": state}) after
                each step; the latents that it returns, if any, go on. With `_interrupt = True` of
                the pipeline the state reached is decoded.
            callback_on_step_end_tensor_inputs: which tensors it is given: "latents", and what the
                pictures are of, "class_labels" and "negative_class_labels".
            sigmas, timesteps: where each step starts, decreasing from T_max, in place of
                `num_inference_steps`: as shares of noise (OT_FM), or the transport's times, with a
                `scheduler` its own.
            guider: one of diffusers' that combines predictions with and without the condition, in
                place of `guidance_scale` and `guidance_interval`; it is asked at every step.
            batch_invariant: each picture has the bits that it has alone, for the price of batches
                of one.

        Raises:
            ValueError: labels, sizes or options that do not fit.
            FloatingPointError: what the network or the autoencoder computes is not finite.
        """
        call = Call(
            height, width, num_inference_steps, guidance_scale, guidance_interval,
            stochasticity_ratio, sample_type, generator, latents, output_type, return_dict,
            callback_on_step_end, callback_on_step_end_tensor_inputs, sigmas, timesteps, guider,
            batch_invariant,
        )  # fmt: skip
        options = self._begin(call)
        y, y_null = _labels(class_labels), None
        if call.is_guided:
            if not self.transformer.config.class_dropout_prob > 0:
                by = "a guider" if guider is not None else f"guidance_scale = {guidance_scale}"
                raise ValueError(
                    f"guidance ({by}) needs a network with the label of no class: it was trained "
                    "with class_dropout_prob = 0"
                )
            y_null = torch.full_like(y, self.transformer.config.num_classes)
        self.transformer.y_embedder.check(y, len(y))  # on the CPU, where it reads them
        y, y_null = (None if v is None else v.to(self._execution_device) for v in (y, y_null))
        return self._generate(call, options, y, y_null)


def _labels(class_labels: Labels) -> Tensor:
    """As int64 (B,) on the CPU."""
    refusal = f"class_labels must be one or more integers, got {class_labels!r}"
    try:
        if isinstance(class_labels, (list, tuple)):
            class_labels = [whole("a label", label) for label in class_labels]
        y = torch.as_tensor(class_labels, device="cpu").reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(refusal) from error
    if not y.numel() or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(refusal)
    return y.long()
