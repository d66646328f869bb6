"""What can be set, the published settings by name, and the folder's name that says them.

Light to import: the commands' options are made of it.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DTYPES = ("bfloat16", "float32", "float16")


def _option(default: Any, help: str, *names: str) -> Any:
    """A field; `names` are other names of the command's option."""
    return dataclasses.field(default=default, metadata={"help": help, "names": names})


def _lot(size: int) -> Any:
    return _option(size, "Pictures in a lot, on which their last bits depend.")


@dataclass(frozen=True)
class Settings:
    """What all four samplers take, with the defaults of the published ones.

    Raises:
        ValueError: a value is out of range.
    """

    height: int | None = _option(None, "Of a picture, px; the network's own size by default.")
    width: int | None = _option(None, "As height.")
    num_steps: int = _option(50, "Network evaluations, two each where guidance acts.", "--steps")
    cfg_scale: float = _option(1.5, "Classifier-free guidance; 1 is none.")
    guidance_low: float = _option(0.0, "Guidance acts where low·T_max < t < high·T_max.")
    guidance_high: float = _option(1.0, "As guidance-low; with 1 not on the first step.")
    T_max: float | None = _option(None, "Where sampling starts; the transport's by default.")
    T_min: float | None = _option(None, "Where sampling ends; the transport's by default.")
    stochasticity_ratio: float = _option(0.0, "Noise added between the first and last step.")
    sample_type: str = _option("transition", "transition or ddiffusion.")
    global_seed: int = _option(0, "Of all that is drawn.", "--seed")
    per_proc_batch_size: int = _option(
        32, "Pictures that go together, each process.", "--batch-size"
    )
    batch_invariant: bool = _option(
        True,
        "Bytes are the same at any batch size and number of processes: the network runs lots of "
        "one shape, in which a picture has its place, text encoder and autoencoder picture by "
        "picture, on a CPU with one thread. Without it whole batches run, somewhat faster on a "
        "GPU, and a picture may differ in its last bits with the batch that it was in.",
    )
    lot_size: int = _lot(4)  # the pictures of a prompt
    slice_vae: bool = _option(
        False,
        "Decode picture by picture, to save memory; so it is when batch-invariant.",
        "--slice_vae/--no-slice_vae",
    )
    dtype: str = _option("bfloat16", f"Of network and text encoder: {', '.join(DTYPES)}.")
    tf32: bool = _option(True, "TF32 in float32 matrix products on a GPU, as published.")

    def __post_init__(self):
        from tim.sampling import SAMPLE_TYPES

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (float, float | None) and value is not None:
                object.__setattr__(self, field.name, float(value))  # as the folder's name has it
        self._whole(1, "height", "width", "num_steps", "per_proc_batch_size", "lot_size")
        self._whole(0, "global_seed")
        _check("cfg_scale", self.cfg_scale, "at least 1", lambda scale: scale >= 1)
        _check("stochasticity_ratio", self.stochasticity_ratio, "at least 0", lambda s: s >= 0)
        _check("sample_type", self.sample_type, SAMPLE_TYPES, SAMPLE_TYPES.__contains__)
        _check("dtype", self.dtype, DTYPES, DTYPES.__contains__)

    def _whole(self, least: int, *names: str) -> None:
        from tim.checks import whole

        for name in names:
            if (value := getattr(self, name)) is not None:
                whole(name, value, least)


@dataclass(frozen=True)
class TextSettings(Settings):
    """Of the samplers of prompts."""

    published_padding: bool = _option(
        False,
        "Pad a prompt to the longest of its batch, which changes the picture, as published; "
        "else each prompt has its own length.",
    )
    escape_captions: bool = _option(
        False, "Write prompts with Python's escapes (é as \\xe9), as the training's captions were."
    )


@dataclass(frozen=True)
class DPGSettings(TextSettings):
    """Of DPG-Bench's sampler."""

    save_latent: bool = _option(False, "Write the four latents in place of the picture.")


@dataclass(frozen=True)
class MJHQSettings(TextSettings):
    """Of MJHQ-30K's sampler."""

    lot_size: int = _lot(1)
    quality: int = _option(75, "Of the JPEG files, 1 to 95; published is Pillow's default.")

    def __post_init__(self):
        super().__post_init__()
        self._whole(1, "quality")
        _check("quality", self.quality, "at most 95", lambda quality: quality <= 95)


@dataclass(frozen=True)
class ClassSettings(Settings):
    """Of ImageNet's sampler."""

    lot_size: int = _lot(16)
    num_fid_samples: int = _option(50_000, "Pictures in all.", "--num-samples")
    num_classes: int | None = _option(None, "Labels are below it; the network's by default.")
    balanced: bool = _option(
        False, "Labels go round through the classes; as published they are drawn, uniformly."
    )

    def __post_init__(self):
        super().__post_init__()
        self._whole(1, "num_fid_samples", "num_classes")


def _check(name: str, value: Any, needed: Any, is_right: Callable[[Any], bool]) -> None:
    if not is_right(value):
        needed = needed if isinstance(needed, str) else f"one of {', '.join(needed)}"
        raise ValueError(f"{name} must be {needed}, got {value!r}")


def _preset(
    side: int, batch: int, steps: int, scale: float, high: float = 1.0, stochasticity: float = 0.0
) -> dict[str, Any]:
    return dict(
        height=side, width=side, per_proc_batch_size=batch, num_steps=steps, cfg_scale=scale,
        guidance_high=high, stochasticity_ratio=stochasticity,
    )  # fmt: skip


KINDS: dict[str, type[Settings]] = {
    "geneval": TextSettings, "dpg": DPGSettings, "mjhq": MJHQSettings, "imagenet": ClassSettings,
}  # fmt: skip
# The published ones by benchmark and name; a batch is that of each of 4 GPUs.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "geneval": {
        "geneval": _preset(1024, 32, 4, 2.5),
        "geneval-64": _preset(1024, 32, 64, 2.5),
        "geneval-2560": _preset(2560, 4, 4, 2.5),
    },
    "dpg": {
        "dpg": _preset(1024, 32, 4, 2.5),
        "dpg-16": _preset(1024, 32, 16, 2.5),
    },
    "mjhq": {
        "mjhq": _preset(1024, 32, 4, 1.5),
        "mjhq-16": _preset(1024, 32, 16, 1.5),
    },
    "imagenet": {
        "imagenet-256-1": _preset(256, 128, 1, 1.0),
        "imagenet-256-250": _preset(256, 128, 250, 2.5, 0.6, 0.2),
        "imagenet-512-1": _preset(512, 32, 1, 1.0),
        "imagenet-512-250": _preset(512, 32, 250, 3.0, 0.7, 0.2),
    },
}


def make(benchmark: str, preset: str | None = None, **changes: Any) -> Settings:
    """The settings of a benchmark: the published defaults, or a preset, with changes.

    Raises:
        ValueError: an unknown benchmark or preset, or a value out of range.
    """
    if benchmark not in KINDS:
        raise ValueError(f"the benchmark must be one of {', '.join(KINDS)}, got {benchmark!r}")
    known = PRESETS[benchmark]
    if preset is not None and preset not in known:
        raise ValueError(f"the preset must be one of {', '.join(known)}, got {preset!r}")
    return KINDS[benchmark](**{**known.get(preset or "", {}), **changes})


def folder_name(settings: Settings, name: str, data_type: str = "") -> str:
    """The published one, of settings in which all is said.

    Args:
        name: of the checkpoint, up to its first dot.
        data_type: the benchmark's word at the beginning, if any.
    """
    s = settings
    parts = [
        *filter(None, [data_type]), name, f"{s.height}x{s.width}", f"T{s.T_min}", str(s.T_max),
        f"Step-{s.num_steps}", f"sto-{s.stochasticity_ratio}", s.sample_type,
        f"cfg-{s.cfg_scale}", str(s.guidance_low), str(s.guidance_high),
    ]  # fmt: skip
    return "-".join(parts)
