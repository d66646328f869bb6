"""Latents of many sizes, made beforehand at native resolution (NiT, 2506.03131)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from tim.checks import whole
from tim.data import pictures
from tim.data.base import Item, TrainingSet, is_mirrored
from tim.data.files import JsonLines, Packs, existing
from tim.data.latent_images import read_latent
from tim.data.samplers import PackedSampler, Visit

NATIVE = "native-resolution"
_SIZES = ("latent_h", "latent_w", "image_h", "image_w")


class NativeLatents(TrainingSet):
    """Latents and pictures of the sizes that their metadata say.

    Args:
        jsonl_dir: a file of one JSON object a line: `image_file`, `latent_file`, `latent_h`,
            `latent_w`, `image_h`, `image_w` (px) and `type`, `native-resolution` (the picture is
            stretched to its size) or `fixed-SxS` (its middle is cut out).
        latent_dirs: the folder of each of `data_types`, where `latent_file` starts from; a latent
            is as in `LatentImages`.
        image_dir: where `image_file` starts from.
        packed_json: a list of lists of line numbers, the batches, each of latents of many sizes;
            None groups latents of one size by the sampler's `batch_size`.

    Items: latent (C, h, w) float32, image (3, H, W) float32 in [-1, 1], label () int64. A batch of
    several sizes has lists of them.

    Raises:
        ValueError: a folder, a file or a line is not as said.

    Example:
        >>> data = NativeLatents("meta.jsonl", ["latents"], "pictures")
        >>> batch = data.collate([data[i] for i in next(iter(data.sampler(8, seed=0)))])
    """

    names = ("latent", "image", "label")

    def __init__(
        self,
        jsonl_dir: str | Path,
        latent_dirs: Sequence[str | Path],
        image_dir: str | Path,
        *,
        data_types: Sequence[str] = (NATIVE,),
        packed_json: str | Path | None = None,
        num_classes: int = 1000,
    ):
        if isinstance(latent_dirs, str) or len(latent_dirs) != len(data_types):
            raise ValueError(
                f"latent_dirs must be one folder for each of data_types {list(data_types)}, "
                f"got {latent_dirs}"
            )
        folders = [existing("latent_dirs", each, "folder") for each in latent_dirs]
        self.latent_dirs = dict(zip(data_types, folders, strict=True))
        self.image_dir = existing("image_dir", image_dir, "folder")
        self.num_classes = whole("num_classes", num_classes, 1)
        self._lines = JsonLines(jsonl_dir, self._checked_size)
        self.sizes = self._lines.checked  # of latents: (N, 2), h and w
        self.packs = None if packed_json is None else Packs(packed_json, len(self))

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Item:
        line, is_flipped = self._lines[index], is_mirrored(index)
        path = self.latent_dirs[line["type"]] / line["latent_file"]
        size = line["latent_h"], line["latent_w"]
        latent, label = read_latent(path, is_flipped, self.num_classes, size)
        image = pictures.read(self.image_dir / line["image_file"])
        if line["type"] == NATIVE:
            image = pictures.stretched(image, line["image_w"], line["image_h"])
        else:
            image = pictures.centre_crop(image, line["image_w"])
        image = pictures.to_tensor(image, mirrored=is_flipped)
        return {"latent": latent, "image": image, "label": label}

    def sampler(
        self, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> Sampler[list[Visit]]:
        """As TrainingSet's; with a `packed_json` its batches, and `batch_size` is not used."""
        packs = self.packs
        if packs is None:
            packs = by_size(self.sizes, batch_size, seed=seed)
        return PackedSampler(packs, seed=seed, start=start, rank=rank, world_size=world_size)

    def _checked_size(self, line: dict[str, Any]) -> tuple[int, int]:
        sizes = [whole(name, line[name], 1) for name in _SIZES]
        kind, has_names = line["type"], isinstance(line["latent_file"], str)
        if kind not in self.latent_dirs:
            raise ValueError(f"type must be one of {', '.join(self.latent_dirs)}, got {kind!r}")
        if kind != NATIVE and not re.fullmatch(f"fixed-{sizes[3]}x{sizes[2]}", kind):
            raise ValueError(f"a picture of {kind} must have its size, got {sizes[3]}x{sizes[2]}")
        if not has_names or not isinstance(line["image_file"], str):
            raise ValueError("image_file and latent_file must be texts")
        return sizes[0], sizes[1]


def by_size(sizes: np.ndarray, batch_size: int, *, seed: int = 0) -> list[list[int]]:
    """Batches of lines of one of the sizes (N, 2), drawn by `seed`; a size's last may be small."""
    whole("batch_size", batch_size, 1)
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).numpy()
    order = order[np.lexsort(sizes[order].T)]
    starts = np.flatnonzero((np.diff(sizes[order], axis=0) != 0).any(axis=1)) + 1
    groups = [group.tolist() for group in np.split(order, starts)]
    return [g[i : i + batch_size] for g in groups for i in range(0, len(g), batch_size)]
