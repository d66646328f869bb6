"""What a pipeline does but for its conditioning: noise, sampling, decoding."""

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, SupportsIndex

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from typing_extensions import Self

from tim import checkpoints, config
from tim.checkpoints import CONFIG
from tim.checks import check_computed, whole
from tim.encoders import Autoencoder, Pixels
from tim.files import saved_whole
from tim.images import by_size
from tim.sampling import Engine, Step, sample_packed
from tim.transports import TRANSPORTS, TransportName, make

from .callbacks import States, inputs_of, on_step
from .calls import Call, Pictures, Side, is_several
from .lora import LoRALoader
from .schedule import check_scheduler, count_of


@saved_whole
class TiMPipeline(LoRALoader, DiffusionPipeline):
    """What both pipelines share; components are `transformer`, `vae`, `scheduler` and those of the
    text. Without `vae` the network draws pictures themselves, of 1 or 3 channels; a `scheduler`,
    diffusers' `FlowMapEulerDiscreteScheduler` or `FlowMatchEulerDiscreteScheduler`, says at which
    times OT_FM steps.

    Offloading moves the network as a whole, unless its own `enable_group_offload` does it. As in
    diffusers' pipelines, `_interrupt = True`, set in a callback or by another thread, ends a call
    with the state that it has reached.
    """

    _interrupt = False
    _guidance_scale = _num_timesteps = None
    _callback_tensor_inputs: list[str]  # "latents", and what y and y_null are called
    _engine: Engine | None = None
    _engine_options: Mapping[str, Any] = MappingProxyType({"graphs": False})

    _exclude_from_cpu_offload = ["transformer"]  # of the sequential kind, layer by layer

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | Path,
        *,
        config: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """From a released weight file or its address on the hub, such as
        ("c2i_model_256.safetensors", config="xl-256").

        `config` is a preset's name or a YAML file, as of `from_checkpoint`, or the folder of a
        saved pipeline, whose other parts are taken. The dtype is the file's unless given. `options`
        are other components, and `local_files_only`, `cache_dir`, `force_download` and `token` of
        the hub.

        Raises:
            ValueError: see `from_checkpoint`; weights that do not fit are named.
            OSError: a file or folder is not to be had.
        """
        hub = {name: options.pop(name) for name in checkpoints.HUB if name in options}
        if config is None:
            raise ValueError(f"{pretrained_model_link_or_path} holds weights alone: {CONFIG}")
        path = checkpoints.local(pretrained_model_link_or_path, **hub)
        dtype = torch_dtype if dtype is None else dtype
        if Path(config).is_dir():
            if foreign := options.keys() - inspect.signature(cls.__init__).parameters:
                raise TypeError(f"{cls.__name__} has no {', '.join(sorted(foreign))}")
            of_all = {} if dtype is None else dict(torch_dtype=dtype)
            network = checkpoints.load(path, config, dtype=dtype)
            return cls.from_pretrained(config, transformer=network, **of_all, **hub, **options)
        return cls.from_checkpoint(path, config, dtype=dtype, **options)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> Self:
        """With the components and settings of another pipeline, but for those that are given.

        Of one of ours, components keep their dtypes, unless `torch_dtype` or `dtype` is given;
        diffusers' own casts what both share to float32.
        """
        if not isinstance(pipeline, TiMPipeline):
            return super().from_pipe(pipeline, **options)
        dtypes = [options.pop(name) for name in ("dtype", "torch_dtype") if name in options]
        own = inspect.signature(cls.__init__).parameters
        given = pipeline.config | pipeline.components
        made = cls(**{name: given[name] for name in own if name in given} | options)
        return made.to(dtype=dtypes[0]) if dtypes else made

    def _set_up(self, transport: str, transport_params: Mapping[str, Any] | None) -> None:
        params = dict(transport_params or {})
        self._transport = make(transport, **params)
        check_scheduler(self.scheduler, self._transport)
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

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        is_late = name in self._optional_components and value is not None
        if is_late and list(self.config.get(name) or ()) == [None, None]:
            self.register_modules(**{name: value})  # diffusers would not save it

    @property
    def interrupt(self) -> bool:
        """Whether the call under way is to end."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float | None:
        """Of the latest call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int | None:
        """Steps of the latest call."""
        return self._num_timesteps

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

    def _begin(self, call: Call) -> dict[str, Any]:
        """The sampler's options; refuses what can be refused before anything is computed."""
        self._interrupt = False  # of the call that begins
        self._sizes(call.height, call.width)
        options = call.sampling(self._transport, self.scheduler)
        names = call.callback_on_step_end_tensor_inputs
        inputs_of(call.callback_on_step_end, names, self._callback_tensor_inputs)
        self._guidance_scale = call.guidance_scale
        self._num_timesteps = count_of(options)
        return options

    def _generate(
        self,
        call: Call,
        options: dict[str, Any],
        y: Tensor | list[Tensor],
        y_null: Tensor | list[Tensor] | None,
        text_lengths: Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Pictures]:
        """`options` are those of `_begin`, y and y_null of each picture; if each is drawn for
        itself, they may be of several lengths."""
        sizes = self._sizes(call.height, call.width)
        if len(sizes) > 1 and len(sizes) != len(y):
            raise ValueError(
                f"height and width must be of one or {len(y)} pictures, got {len(sizes)}"
            )
        if call.is_ragged:
            sizes = sizes * (len(y) // len(sizes))
            z = self._initial_states(sizes, call.generator, call.latents)
        else:
            shape = len(y), *self._shape(*sizes[0])
            z = self._initial_state(shape, call.generator, call.latents)

        def until_interrupted(steps: Iterable[Step]) -> Iterable[Step]:
            return itertools.takewhile(lambda _: not self._interrupt, self.progress_bar(steps))

        options = options | dict(progress=until_interrupted)
        if (callback := call.callback_on_step_end) is not None:
            known = self._callback_tensor_inputs
            names = inputs_of(callback, call.callback_on_step_end_tensor_inputs, known)
            conditions = dict(zip(known[1:], (y, y_null), strict=False))
            options["on_step"] = on_step(self, callback, names, conditions)
        if call.batch_invariant:
            x = self._one_by_one(z, y, y_null, call.generator, options)
        elif call.is_ragged:
            given = self.transformer, self._transport, z, y, y_null
            options |= dict(generator=call.generator, text_lengths=text_lengths)
            x = sample_packed(*given, **options)
        else:
            x = self.engine.sample(z, y, y_null, generator=call.generator, **options)
        images = x
        if call.output_type != "latent":
            images = self._decode(x, call.output_type, call.batch_invariant)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if call.return_dict else (images,)

    def _one_by_one(self, z: States, y, y_null, generator, options: dict[str, Any]) -> States:
        """Each picture has the bits that it has alone."""
        several = isinstance(generator, list)
        if options["stochasticity_ratio"] and generator is not None and not several and len(z) > 1:
            raise ValueError("batch_invariant with noise in between needs a generator a picture")
        x = [
            self.engine.sample(
                z[i][None], y[i][None], None if y_null is None else y_null[i][None],
                generator=generator[i] if several else generator, **options,
            )[0]
            for i in range(len(z))
        ]  # fmt: skip
        return x if isinstance(z, list) else torch.stack(x)

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
        generators = generator if isinstance(generator, list) else [generator] * batch
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
        if isinstance(generator, list) and len(generator) != shape[0]:
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

    def _decode(self, x: States, output_type: str, one_by_one: bool = False) -> Pictures:
        decode = self._autoencoder().decode
        if one_by_one:
            images = [decode(each[None])[0] for each in x]
            images = images if isinstance(x, list) else torch.stack(images)
        else:
            images = by_size(decode, x) if isinstance(x, list) else decode(x)
        if isinstance(images, list):
            return [self._postprocessed(image[None], output_type)[0] for image in images]
        return self._postprocessed(images, output_type)

    def _postprocessed(self, images: Tensor, output_type: str):
        if self.vae is not None:
            check_computed("the pictures", images, "the autoencoder", self.vae.dtype)
        return self.image_processor.postprocess(images.float(), output_type)


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


def text_settings(cfg: DictConfig) -> dict[str, Any]:
    """How a configuration's network reads texts; what it does not say is the released network's."""
    published = dict(
        max_seq_length=256, use_last_hidden_state=True, escape_captions=True, min_seq_length=1
    )
    return {name: cfg.model.get(name, value) for name, value in published.items()}


def folder_of(cfg: DictConfig, name: str, argument: str) -> str:
    """`model.<name>` of a configuration.

    Raises:
        ValueError: it names none; the message asks for `argument` instead.
    """
    folder = cfg.model.get(name)
    if not folder:
        raise ValueError(f"the configuration has no model.{name}, got {folder!r}: give {argument}")
    return folder
