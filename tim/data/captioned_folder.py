"""A folder of one's own pictures, of any sizes, each with a caption."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Sampler

from tim.captions import escaped
from tim.checks import some, whole
from tim.data import pictures
from tim.data.base import Item, TrainingSet, is_mirrored, reading
from tim.data.files import Names, existing, pictures_under
from tim.data.samplers import FlatSampler, PackedSampler, Visit

_log = logging.getLogger(__name__)
METADATA = "metadata.jsonl"
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)  # of EXIF


class CaptionedFolder(TrainingSet):
    """Pictures in any depth, in the layout of Hugging Face's imagefolder or with texts beside them.

    With a `metadata.jsonl`, each of its lines has a `file_name`, from the folder on, and a `text`;
    without, `cat.png` has its caption in `cat.txt`. Every picture needs one. Pictures are read
    upright, and what is transparent is white.

    Args:
        image_dir: the folder.
        image_size: side S of the square that is cut out of the middle, in px, as `ImageFolder`
            does. Without it a picture keeps its shape, as `tim preprocess --native` does it: sides
            of multiples of `min_image_size`, an area of at most `max_image_size`², in px.
        flip: mirror every other picture at random.
        escape_captions: by `tim.captions.escaped`, as the released network was trained.

    Items: image (3, H, W) float32 in [-1, 1]; caption, a str. Batches are of one size, of which
    there are as many as pictures of several shapes have; `data.pack_tokens` mixes them.

    Raises:
        ValueError: a picture has no caption, or a caption no picture, or an argument is wrong.
        UnreadableError: a file is no picture.

    Example:
        >>> data = CaptionedFolder("pictures", 64)  # pictures/cat.png, pictures/cat.txt, …
        >>> data[0]["caption"]
        'a cat'
    """

    names = ("image", "caption")

    def __init__(
        self,
        image_dir: str | Path,
        image_size: int | None = None,
        *,
        min_image_size: int = 32,
        max_image_size: int = 2048,
        flip: bool = False,
        escape_captions: bool = False,
    ):
        self.image_dir = existing("image_dir", image_dir, "folder")
        self.image_size = None if image_size is None else whole("image_size", image_size, 1)
        self._limits = {
            "unit": whole("min_image_size", min_image_size, 1),
            "most": whole("max_image_size", max_image_size, 1),
        }
        for name, flag in (("flip", flip), ("escape_captions", escape_captions)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be true or false, got {flag!r}")
        self.flip, self.escape_captions = flip, escape_captions
        captions = _captions(self.image_dir)
        self._files, self._captions = Names(captions), list(captions.values())
        sizes = np.array([self._size(self.image_dir / file) for file in captions])  # (W, H)
        if self.image_size is None:
            self.sizes = sizes[:, ::-1].copy()

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> Item:
        path = self.image_dir / self._files[index]
        image = pictures.read(path, upright=True, on_white=True)
        if self.image_size is None:
            image = pictures.stretched(image, *self.sizes[index, ::-1].tolist())
        else:
            image = pictures.centre_crop(image, self.image_size)
        is_flipped, caption = self.flip and is_mirrored(index), self._captions[index]
        return {
            "image": pictures.to_tensor(image, mirrored=is_flipped),
            "caption": escaped(caption) if self.escape_captions else caption,
        }

    @property
    def shown(self) -> Sequence[str]:
        """Captions to look at while training."""
        return list(dict.fromkeys(self._captions))[:4]

    def sampler(
        self, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> Sampler[list[Visit]]:
        """As TrainingSet's; pictures of several sizes are in batches of one, always together."""
        options = dict(seed=seed, start=start, rank=rank, world_size=world_size)
        if self.sizes is None or len(shapes := np.unique(self.sizes, axis=0)) == 1:
            return FlatSampler(len(self), batch_size, **options)
        whole("batch_size", batch_size, 1)
        of_shape = [np.flatnonzero((self.sizes == shape).all(axis=1)).tolist() for shape in shapes]
        packs = [
            each[at : at + batch_size]
            for each in of_shape
            for at in range(0, len(each), batch_size)
        ]
        return PackedSampler(packs, **options)

    def _size(self, path: Path) -> tuple[int, int]:
        """(W, H) as the network gets it; only the head of the file is read."""
        with reading(path), Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(_ORIENTATION) in _SIDEWAYS:
                width, height = height, width
        if self.image_size is not None:
            return self.image_size, self.image_size
        return pictures.native_size(width, height, **self._limits)


def _captions(root: Path) -> dict[str, str]:
    """Each picture's, by its path from `root`, sorted."""
    found, others = pictures_under(root, root)
    if not found:
        raise ValueError(f"{root} has no pictures")
    has_list = METADATA in others
    if odd := [n for n in others if n != METADATA and (has_list or not n.endswith(".txt"))]:
        _log.warning("%s: not used: %s", root, some(odd))
    given = _listed(root / METADATA) if has_list else _beside(root, others)
    where = f"in {root / METADATA}" if has_list else "in a .txt beside it"
    # What stands beside "cat.png" is found by "cat".
    wanted = {name if has_list else name.rpartition(".")[0]: name for name in found}
    if len(wanted) < len(found):
        twice = [name for name in found if name not in wanted.values()]
        raise ValueError(f"{root}: several pictures would share a .txt: {some(twice)}")
    if missing := [name for key, name in wanted.items() if key not in given]:
        raise ValueError(f"{root}: no caption {where} for {some(missing)}")
    if lost := [key if has_list else f"{key}.txt" for key in given if key not in wanted]:
        raise ValueError(f"{root}: a caption without its picture: {some(lost)}")
    if empty := [name for key, name in wanted.items() if not given[key]]:
        raise ValueError(f"{root}: an empty caption {where} for {some(empty)}")
    return {name: given[key] for key, name in wanted.items()}


def _listed(path: Path) -> dict[str, str]:
    found = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{path}, line {number}: {{"file_name": …, "text": …}} is needed, got '
                f"{line.decode(errors='replace')[:80]}"
            ) from None
        if (name := os.path.normpath(name)) in found:
            raise ValueError(f"{path}, line {number}: {name} again")
        found[name] = " ".join(text.split())
    return found


def _beside(root: Path, others: list[str]) -> dict[str, str]:
    found = {}
    for name in others:
        if name.endswith(".txt"):
            with reading(root / name):
                text = (root / name).read_text("utf-8-sig")  # Windows writes a mark
            found[name.removesuffix(".txt")] = " ".join(text.split())
    return found
