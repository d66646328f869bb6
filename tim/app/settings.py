"""The settings of `tim sample`, from options or from a picture's metadata."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tim.app.common import dtype_of
from tim.checks import closest, whole
from tim.data.classes import class_id
from tim.pipelines import TiMClassPipeline, TiMTextPipeline

Pipeline = TiMClassPipeline | TiMTextPipeline


@dataclass(frozen=True)
class Settings:
    """All that pictures depend on, as it stands in their metadata. What is None is the network's:
    `filled` says what.

    Raises:
        ValueError: one is of another kind or out of range.
    """

    model: str
    what: tuple[str, ...]  # prompts, or ids and names of classes
    config: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    steps: int = 8
    guidance: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    sample_type: str = "transition"
    stochasticity: float = 0.0
    seed: int = 0  # of the first picture; the next has the next
    count: int = 1  # pictures of each of `what`
    dtype: str | None = None
    device: str = "cpu"
    grid: bool = False

    def __post_init__(self):
        if isinstance(self.what, str):
            raise ValueError(f"what must be a list of prompts or classes, got {self.what!r}")
        object.__setattr__(self, "what", tuple(self.what))
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        for name in ("model", "device", "sample_type"):
            _text(name, getattr(self, name))
        for name in ("config", "vae", "text_encoder", "negative_prompt"):
            if getattr(self, name) is not None:
                _text(name, getattr(self, name))
        if not self.what or not all(isinstance(each, str) for each in self.what):
            raise ValueError(f"prompts or classes are needed, got {list(self.what)}")
        for name, least in (("steps", 1), ("count", 1), ("seed", 0)):
            whole(name, getattr(self, name), least)
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)
        last = self.seed + self.count * len(self.what) - 1
        if last >= 1 << 63:
            raise ValueError(f"seeds must be below 2^63, got {self.seed} to {last}")
        for name in ("guidance", "stochasticity"):
            _number(name, getattr(self, name))
        if self.guidance is not None:
            check_guidance(self.guidance)
        low_high = [_number("guidance_interval", bound) for bound in self.guidance_interval]
        if len(low_high) != 2 or not 0 <= low_high[0] <= low_high[1]:
            raise ValueError(f"guidance_interval must be 0 ≤ low ≤ high, got {low_high}")
        dtype_of(self.dtype)

    def filled(self, pipeline: Pipeline) -> "Settings":
        """With what they leave to the network.

        Raises:
            ValueError: they do not fit it.
        """
        network = pipeline.transformer.config
        own = network.input_size * pipeline.vae_scale_factor
        is_text = isinstance(pipeline, TiMTextPipeline)
        if self.negative_prompt is not None and not is_text:
            raise ValueError("a negative prompt needs a network of prompts: this one is of classes")
        if not is_text:
            for each in self.what:
                class_id(each, network.num_classes)
        can_guide = is_text or network.class_dropout_prob > 0
        return dataclasses.replace(
            self,
            height=self.height or own,
            width=self.width or own,
            guidance=self.guidance or (1.5 if can_guide else 1.0),
            dtype=str(pipeline.transformer.dtype).removeprefix("torch."),
        )

    def single(self, what: str, seed: int) -> "Settings":
        """Those of one picture alone."""
        return dataclasses.replace(self, what=(what,), seed=seed, count=1, grid=False)


def settings_of(values: dict[str, Any]) -> Settings:
    """Those of a record, or given.

    Raises:
        ValueError: one is unknown, or see `Settings`.
    """
    known = [field.name for field in dataclasses.fields(Settings)]
    if unknown := [name + closest(name, known) for name in values if name not in known]:
        raise ValueError(f"there is no setting {', '.join(unknown)}")
    if "model" not in values:
        raise ValueError("the settings name no model")
    if "what" not in values:
        raise ValueError("what to draw is missing: give prompts, or ids or names of classes")
    try:
        return Settings(**values)
    except TypeError as error:
        raise ValueError(f"the settings cannot be read: {error}") from error


def check_guidance(guidance: float) -> None:
    if guidance < 1:
        raise ValueError(f"guidance must be at least 1, which is none; got {guidance:g}")


def _text(name: str, given: Any) -> None:
    if not isinstance(given, str):
        raise ValueError(f"{name} must be a text, got {given!r}")


def _number(name: str, given: Any) -> Any:
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if given is not None and not (is_number and math.isfinite(given)):
        raise ValueError(f"{name} must be a finite number, got {given!r}")
    return given
