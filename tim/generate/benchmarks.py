"""What each benchmark draws, and the files that its pictures become."""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tim.data import prompts
from tim.data.pictures import read
from tim.data.prompts import Prompt
from tim.generate import pixels
from tim.generate.settings import (
    KINDS,
    ClassSettings,
    DPGSettings,
    MJHQSettings,
    Settings,
    TextSettings,
)


class Benchmark(ABC):
    """A list of items, each of which is some pictures and the files made of them.

    Attributes:
        items: what is drawn, in order. Names are unique; a class sampler's texts are empty.
        keeps_latents: files are made of latents (C, h, w), else of levels (H, W, 3) uint8.
    """

    name: ClassVar[str]
    data_type: ClassVar[str] = ""  # the published word in the folder's name
    pictures: ClassVar[int] = 1  # of an item
    keeps_latents = False

    def __init__(self, settings: Settings, items: Sequence[Prompt]):
        kind = KINDS[self.name]
        if not isinstance(settings, kind):
            raise ValueError(f"{self.name} needs {kind.__name__}, got {type(settings).__name__}")
        self.settings, self.items = settings, items

    @abstractmethod
    def files(self, item: Prompt) -> list[str]:
        """All that an item consists of, as paths in the folder."""

    def wanted(self, item: Prompt, absent: Collection[str]) -> Sequence[int]:
        """Which of its pictures must be drawn for the files that are absent."""
        return range(self.pictures) if absent else ()

    def levels(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] to (B, H, W, 3) uint8."""
        return pixels.truncated(images)

    @abstractmethod
    def write(
        self, item: Prompt, drawn: Mapping[int, Tensor], absent: Collection[str], new: Path,
        old: Path,
    ) -> None:  # fmt: skip
        """Write what is absent under `new`; `old` is where the item's other files are."""


class GenEval(Benchmark):
    """553 prompts, or those of a JSONL file of the same form: four pictures each, their grid, and
    the prompt's line."""

    name, data_type, pictures = "geneval", "geneval", 4

    def __init__(self, settings: TextSettings, captions: str | Path | None = None):
        super().__init__(settings, prompts.geneval(captions))

    def files(self, item: Prompt) -> list[str]:
        return [*self._samples(item), f"{item.name}/metadata.jsonl", f"{item.name}/grid.png"]

    def wanted(self, item: Prompt, absent: Collection[str]) -> Sequence[int]:
        return [index for index, file in enumerate(self._samples(item)) if file in absent]

    def levels(self, images: Tensor) -> Tensor:
        return pixels.rounded(images)

    def write(self, item, drawn, absent, new, old) -> None:
        samples = self._samples(item)
        (new / samples[0]).parent.mkdir(parents=True)
        for index, levels in drawn.items():
            _save(levels.numpy(), new / samples[index], format="PNG")
        line, grid = f"{item.name}/metadata.jsonl", f"{item.name}/grid.png"
        if line in absent:
            (new / line).write_text(json.dumps(item.metadata), encoding="utf-8")
        if grid in absent:
            four = [
                drawn[index].numpy() if index in drawn else self._read(old / file)
                for index, file in enumerate(samples)
            ]
            _save(pixels.grid(np.stack(four)), new / grid, format="PNG")

    @staticmethod
    def _samples(item: Prompt) -> list[str]:
        return [f"{item.name}/samples/{index:05d}.png" for index in range(GenEval.pictures)]

    def _read(self, path: Path) -> np.ndarray:
        levels = np.asarray(read(path))
        needed = self.settings.height, self.settings.width, 3
        if levels.shape != needed:
            raise ValueError(f"{path} is {levels.shape}, not {needed}: remove it")
        return levels


class DPG(Benchmark):
    """The prompts of a folder of ID.txt: the grid of four pictures each, or their latents."""

    name, data_type, pictures = "dpg", "dpgbench", 4

    def __init__(self, settings: DPGSettings, captions: str | Path):
        super().__init__(settings, prompts.dpg(captions))
        self.keeps_latents = settings.save_latent

    def files(self, item: Prompt) -> list[str]:
        return [f"{item.name}.{'safetensors' if self.keeps_latents else 'png'}"]

    def levels(self, images: Tensor) -> Tensor:
        return pixels.rounded(images)

    def write(self, item, drawn, absent, new, old) -> None:
        path = new / self.files(item)[0]
        four = torch.stack([drawn[index] for index in range(self.pictures)])
        if self.keeps_latents:
            save_file({"latent": four}, path)
        else:
            _save(pixels.grid(four.numpy()), path, format="PNG")


class MJHQ(Benchmark):
    """The prompts of meta_data.json: a JPEG each, in its category's folder."""

    name, data_type = "mjhq", "mjhq30k"

    def __init__(self, settings: MJHQSettings, captions: str | Path):
        super().__init__(settings, prompts.mjhq(captions))

    def files(self, item: Prompt) -> list[str]:
        return [f"{item.name}.jpg"]

    def write(self, item, drawn, absent, new, old) -> None:
        path = new / self.files(item)[0]
        path.parent.mkdir(exist_ok=True)
        _save(drawn[0].numpy(), path, format="JPEG", quality=self.settings.quality)


class ImageNet(Benchmark):
    """Numbered pictures of a class-conditional network, all in one folder."""

    name = "imagenet"

    def __init__(self, settings: ClassSettings):
        count = settings.num_fid_samples
        super().__init__(settings, [Prompt(f"{number:06d}", "", {}) for number in range(count)])

    def files(self, item: Prompt) -> list[str]:
        return [f"{item.name}.png"]

    def write(self, item, drawn, absent, new, old) -> None:
        _save(drawn[0].numpy(), new / self.files(item)[0], format="PNG")


BENCHMARKS: dict[str, type[Benchmark]] = {
    kind.name: kind for kind in (GenEval, DPG, MJHQ, ImageNet)
}


def _save(levels: np.ndarray, path: Path, **options: Any) -> None:
    Image.fromarray(levels).save(path, **options)
