"""What a pipeline does but for its conditioning: noise, sampling, decoding."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from tim import config
from tim.checks import check_computed, whole
from tim.encoders import Autoencoder, Pixels
from tim.files import saved_whole
from tim.images import by_size
from tim.sampling import Engine, SampleType, sample_packed
from tim.sampling.steps import Step
from tim.transports import TRANSPORTS, TransportName, make

from .lora import LoRALoader

States = Tensor | list[Tensor]  # a list of those of several sizes
StepCallback = Callable[
    [DiffusionPipeline, int, float, dict[str, States]], dict[str, States] | None
]
OutputType = Literal["pil", "np", "pt", "latent"]
# Of "pil", "np", and "pt" or "latent"; of several sizes lists of them.
Pictures = list[Image.Image] | np.ndarray | Tensor | list[np.ndarray] | list[Tensor]
Side = SupportsIndex | Sequence[SupportsIndex] | None
Generators = torch.Generator | list[torch.Generator]


@saved_whole
class TiMPipeline(LoRALoader, DiffusionPipeline):
    """What both pipelines share; components are `transformer`, `vae` and those of the text. Without
    `vae` the network draws pictures themselves, of 1 or 3 channels.

    Offloading moves the network as a whole, unless its own `enable_group_offload` does it. As in
    diffusers' pipelines, `_interrupt = True`, set in a callback or by another thread, ends a call
    with the state that it has reached.
    """

    _interrupt = False
    _engine: Engine | None = None
    _engine_options: Mapping[str, Any] = MappingProxyType({"graphs": False})

    _exclude_from_cpu_offload = ["transformer"]  # of the sequential kind, layer by layer

    def _set_up(self, transport: str, transport_params: Mapping[str, Any] | None) -> None:
        params = dict(transport_params or {})
        self._transport = make(transport, **params)
        self.register_to_config(transport=transport, transport_params=params)
        vae = self._autoencoder()
        self.vae_scale_factor = vae.factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=vae.factor)
        if vae.channels != self.transformer.config.in_channels:
            raise ValueError(
                f"the autoencoder has {vae.channels} latent channels, "
                f"the network {self.transformer.config.in_channels}"
            )

    def _autoencoder(self) -> Autoencoder | Pixels:
        if self.vae is None:
            return Pixels(self.transformer.config.in_channels)
        return Autoencoder(self.vae)

    @property
    def engine(self) -> Engine:
        """The sampler; `engine.explain()` says what it forms before the first step."""
        if self._engine is None or self._engine.model is not self.transformer:
            self._engine = Engine(self.transformer, self._transport, **self._engine_options)
        return self._engine

    def enable_cuda_graphs(self, batch_sizes: Sequence[int] = ()) -> None:
        """Capture a step of sampling in a CUDA graph when its shape comes in a second call, and
        replay it from then on; see `tim.sampling.Engine`, whose `batch_sizes` these are.

        The graphs keep the memory that a step needs until `disable_cuda_graphs`.
        """
        self._engine, self._engine_options = None, {"batch_sizes": tuple(batch_sizes)}

    def disable_cuda_graphs(self) -> None:
        """Capture and replay nothing, as before `enable_cuda_graphs`."""
        self._engine, self._engine_options = None, {"graphs": False}

    def _generate(
        self, y: Tensor, y_null: Tensor | None, height: Side, width: Side,
        num_inference_steps: SupportsIndex, guidance_scale: float,
        guidance_interval: tuple[float, float], stochasticity_ratio: float,
        sample_type: SampleType, generator: Generators | None, latents: States | None,
        output_type: OutputType, return_dict: bool, callback_on_step_end: StepCallback | None,
        text_lengths: Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Pictures]:  # fmt: skip
        sizes = self._sizes(height, width)
        if len(sizes) > 1 and len(sizes) != len(y):
            raise ValueError(
                f"height and width must be of one or {len(y)} pictures, got {len(sizes)}"
            )
        is_ragged = is_several(height) or is_several(width)
        if is_ragged:
            z = self._initial_states(sizes * (len(y) // len(sizes)), generator, latents)
        else:
            z = self._initial_state((len(y), *self._shape(*sizes[0])), generator, latents)
        low, high = guidance_interval

        def until_interrupted(steps: Iterable[Step]) -> Iterable[Step]:
            return itertools.takewhile(lambda _: not self._interrupt, self.progress_bar(steps))

        def on_step(step: int, time: float, state: States) -> States:
            return _latents_of(callback_on_step_end(self, step, time, {"latents": state}), state)

        carry = self.engine.sample
        if is_ragged:
            given = self.transformer, self._transport
            carry = partial(sample_packed, *given, text_lengths=text_lengths)
        x = carry(
            z, y, y_null, num_steps=num_inference_steps, cfg_scale=guidance_scale,
            cfg_low=low, cfg_high=high, stochasticity_ratio=stochasticity_ratio,
            sample_type=sample_type, generator=generator, progress=until_interrupted,
            on_step=None if callback_on_step_end is None else on_step,
        )  # fmt: skip
        images = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_options(self, height, width, num_inference_steps, guidance_interval, output_type):
        """What can be refused before anything is computed; the sampler refuses the rest."""
        self._interrupt = False  # of the call that begins
        self._sizes(height, width)
        whole("num_inference_steps", num_inference_steps, 1)
        if len(guidance_interval) != 2 or not guidance_interval[0] <= guidance_interval[1]:
            raise ValueError(f"guidance_interval must be (low, high), got {guidance_interval}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}")

    def _sizes(self, height: Side, width: Side) -> list[tuple[int, int]]:
        """The height and width of every picture, or of all."""
        heights, widths = (
            list(side) if is_several(side) else [side] for side in (height, width)
        )  # fmt: skip
        count = max(len(heights), len(widths))
        if {len(heights), len(widths)} - {1, count} or not (heights and widths):
            raise ValueError(
                f"height and width must be as many, got {len(heights)} and {len(widths)}"
            )
        pairs = zip(heights * (count // len(heights)), widths * (count // len(widths)), strict=True)
        return [self._size(*pair) for pair in pairs]

    def _size(
        self, height: SupportsIndex | None, width: SupportsIndex | None
    ) -> tuple[int, int]:  # fmt: skip
        network, factor = self.transformer.config, self.vae_scale_factor
        own = network.input_size * factor
        height = own if height is None else whole("height", height)
        width = own if width is None else whole("width", width)
        unit = factor * network.patch_size
        if min(height, width) < 1 or height % unit or width % unit:
            raise ValueError(f"height and width must be multiples of {unit}, got {height}×{width}")
        return height, width

    def _shape(self, height: int, width: int) -> tuple[int, int, int]:
        """That of a picture's latents."""
        factor = self.vae_scale_factor
        return self.transformer.config.in_channels, height // factor, width // factor

    def _initial_states(self, sizes: list[tuple[int, int]], generator, latents) -> list[Tensor]:
        """Of every picture, as if it were alone."""
        batch = len(sizes)
        generators = generator if isinstance(generator, (list, tuple)) else [generator] * batch
        given = [None] * batch if latents is None else list(latents)
        if not all(noise is None or isinstance(noise, Tensor) for noise in given):
            raise ValueError(f"latents must be tensors, got {[type(x).__name__ for x in given]}")
        for name, found in (("generators", generators), ("latents", given)):
            if len(found) != batch:
                raise ValueError(f"{batch} {name} are needed, one a picture; got {len(found)}")
        return [
            self._initial_state(
                (1, *self._shape(*size)), each, None if noise is None else noise[None]
            )[0]
            for size, each, noise in zip(sizes, generators, given, strict=True)
        ]

    def _initial_state(self, shape: tuple[int, ...], generator, latents: Tensor | None) -> Tensor:
        """The state at T_max of the noise that is drawn or given, (B, in_channels, H/f, W/f)."""
        if isinstance(generator, (list, tuple)) and len(generator) != shape[0]:
            raise ValueError(
                f"{shape[0]} generators are needed, one a picture; got {len(generator)}"
            )
        if latents is None:
            latents = randn_tensor(shape, generator, self._execution_device, torch.float32)
        elif not isinstance(latents, Tensor):
            raise ValueError(
                f"latents must be one tensor {shape}, got a {type(latents).__name__}; a list goes "
                "with a list of heights or widths"
            )
        elif tuple(latents.shape) != shape or not latents.is_floating_point():
            raise ValueError(
                f"latents must be floating-point {shape}, got {latents.dtype} "
                f"{tuple(latents.shape)}"
            )
        return self._transport.initial_state(latents.to(self._execution_device))

    def _decode(self, x: States, output_type: str):
        decode = self._autoencoder().decode
        if isinstance(x, list):
            images = by_size(decode, x)
            return [self._postprocessed(image[None], output_type)[0] for image in images]
        return self._postprocessed(decode(x), output_type)

    def _postprocessed(self, images: Tensor, output_type: str):
        if self.vae is not None:
            check_computed("the pictures", images, "the autoencoder", self.vae.dtype)
        return self.image_processor.postprocess(images.float(), output_type)


def is_several(side: Side) -> bool:
    """Whether a height or width is one of each picture."""
    return isinstance(side, (list, tuple))


def _latents_of(returned: Mapping[str, States] | None, state: States) -> States:
    """What a callback made of the state."""
    if returned is None:
        return state
    latents = returned.get("latents", state) if isinstance(returned, Mapping) else None
    needed, got = ([getattr(x, "shape", None) for x in _rows(each)] for each in (state, latents))
    if type(latents) is not type(state) or got != needed:
        shape = tuple(state.shape) if isinstance(state, Tensor) else [*map(tuple, needed)]
        raise ValueError(
            f"callback_on_step_end must return nothing or {{'latents': …}} of shape {shape}, "
            f"got {type(returned).__name__}"
        )
    return latents


def _rows(state: Any) -> list[Any]:
    return state if isinstance(state, list) else [state]


def transport_of(cfg: DictConfig) -> tuple[TransportName, dict[str, Any]]:
    """The published name of a configuration's transport, and its parameters."""
    cls = type(config.build_transport(cfg))
    name = next(name for name, known in TRANSPORTS.items() if known is cls)
    params = cfg.model.transport.get("params") or OmegaConf.create()
    return name, OmegaConf.to_container(params, resolve=True)


def is_of_pixels(cfg: DictConfig) -> bool:
    """Whether a configuration's network draws pictures themselves: it is without an autoencoder and
    has as many channels as pictures."""
    channels = OmegaConf.select(cfg, "model.network.params.in_channels")
    return not cfg.model.get("vae_dir") and channels in (1, 3)


def folder_of(cfg: DictConfig, name: str, argument: str) -> str:
    """`model.<name>` of a configuration.

    Raises:
        ValueError: it names none; the message asks for `argument` instead.
    """
    folder = cfg.model.get(name)
    if not folder:
        raise ValueError(f"the configuration has no model.{name}, got {folder!r}: give {argument}")
    return folder
