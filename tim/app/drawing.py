"""What `tim sample` draws, one picture after the other, and the files that hold it."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from tim.app import assets, record
from tim.app.settings import Pipeline, Settings
from tim.data.classes import class_id
from tim.files import replacing
from tim.images import captioned
from tim.opening import weight_files
from tim.pipelines import TiMClassPipeline, TiMTextPipeline
from tim.pipelines.callbacks import StepCallback
from tim.provenance import file_hash, state_hash, versions
from tim_kernels.dispatch import backend


class Drawn(NamedTuple):
    """A picture, or with output_type "latent" a state (1, C, h, w)."""

    what: str
    seed: int
    picture: Any


def draw(
    pipeline: Pipeline, settings: Settings, output_type: str = "pil",
    on_step: StepCallback | None = None,
) -> Iterator[Drawn]:  # fmt: skip
    """One picture after the other, each from a generator of its own and in a batch of its own:
    it does not depend on the others. `on_step`, a pipeline's callback, is in place of the bars."""
    wanted = [what for what in settings.what for _ in range(settings.count)]
    is_one, is_watched = len(wanted) == 1, on_step is not None
    disable = is_watched or (False if is_one else None)
    pipeline.set_progress_bar_config(desc="steps", leave=is_one, disable=disable)
    pictures = tqdm(wanted, desc="pictures", disable=is_one or is_watched)
    for seed, what in enumerate(pictures, settings.seed):
        (picture,) = pipeline(
            **_condition(pipeline, what, settings.negative_prompt),
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            guidance_interval=settings.guidance_interval,
            sample_type=settings.sample_type,
            stochasticity_ratio=settings.stochasticity,
            generator=torch.Generator().manual_seed(seed),
            output_type=output_type,
            callback_on_step_end=on_step,
        ).images
        yield Drawn(what, seed, picture)


def _condition(pipeline: Pipeline, what: str, negative_prompt: str | None) -> dict[str, Any]:
    if isinstance(pipeline, TiMTextPipeline):
        return {"prompt": what, "negative_prompt": negative_prompt}
    return {"class_labels": class_id(what, pipeline.transformer.config.num_classes)}


def weights_of(pipeline: Pipeline, source: str | Path) -> dict[str, str]:
    """SHA-256 of the network's files, or of its state where it has none, and of the others'
    states."""
    files = weight_files(assets.path_of(source))
    found = {"network": file_hash(*files) if files else state_hash(pipeline.transformer)}
    parts = {"autoencoder": pipeline.vae, "text_encoder": getattr(pipeline, "text_encoder", None)}
    return found | {name: state_hash(part) for name, part in parts.items() if part is not None}


def made_with() -> dict[str, Any]:
    """What a picture's last bits may depend on beside its settings."""
    return {"versions": versions(), "backend": backend.requested()}


def save_pictures(
    pipeline: Pipeline, settings: Settings, output: Path, weights: dict[str, str]
) -> None:  # fmt: skip
    """Of an `output` in .png, one picture is it; of several it is a grid or, without
    `settings.grid`, they are numbered beside it. Any other `output` is a folder of them."""
    of = {"weights": weights, "made_with": made_with()}

    def save(picture: Image.Image, path: Path, settings: Settings) -> None:
        with replacing(path) as new:
            record.save(picture, new, {"settings": dataclasses.asdict(settings), **of})

    if settings.grid:
        drawn = list(draw(pipeline, settings))
        columns = settings.count if settings.count > 1 else None
        captions = [each.what for each in drawn]
        grid = captioned([each.picture for each in drawn], captions, columns)
        return save(grid, output, settings)
    path_of = _paths(output, len(settings.what) * settings.count)
    for number, each in enumerate(draw(pipeline, settings)):
        save(each.picture, path_of(number, each), settings.single(each.what, each.seed))


def _paths(output: Path, count: int) -> Callable[[int, Drawn], Path]:
    def path_of(number: int, drawn: Drawn) -> Path:
        if output.suffix == ".png":
            return output if count == 1 else output.with_stem(f"{output.stem}-{number:03d}")
        name = re.sub(r"\W+", "-", drawn.what).strip("-")[:60]
        return output / f"{number:03d}-{name}-{drawn.seed}.png"

    return path_of


def save_states(
    pipeline: Pipeline, settings: Settings, output: Path, weights: dict[str, str]
) -> None:  # fmt: skip
    """`samples` (B, C, h, w), which the autoencoder would decode, or of a network of pixels the
    pictures in about [-1, 1]; and of classes `labels` (B,)."""
    drawn = list(draw(pipeline, settings, "latent"))
    tensors: dict[str, Tensor] = {"samples": torch.stack([each.picture.cpu() for each in drawn])}
    if isinstance(pipeline, TiMClassPipeline):
        count = pipeline.transformer.config.num_classes
        tensors["labels"] = torch.tensor([class_id(each.what, count) for each in drawn])
    of = {"settings": dataclasses.asdict(settings), "weights": weights, "made_with": made_with()}
    with replacing(output) as new:
        save_file(tensors, new, record.written(of))
