"""Pictures with captions, in batches of one size."""

from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler

from tim.captions import escaped
from tim.checks import whole
from tim.data import pictures
from tim.data.base import Item, TrainingSet, choice
from tim.data.files import JsonLines, Packs, existing
from tim.data.samplers import PackedSampler, Visit

UNIT = 32  # px, which the released network's autoencoder makes one latent of


class CaptionedImages(TrainingSet):
    """Pictures of a few sizes, each with one of its captions, drawn anew at every visit.

    Args:
        root_dir: the folder that the paths of `jsonl_dir` start from.
        packed_json: a JSON file, list of lists of line numbers from 0 on; each is one batch.
        jsonl_dir: a file of one JSON object a line: `image_file`; `bucket`, which ends in "-HxW"
            (px, cut to multiples of `unit`); `captions`, a list of texts.
        unit: px of a token's side, that of the patch times what the autoencoder shrinks by.
        escape_captions: by `tim.captions.escaped`, as the released network was trained.

    Items: image (3, H, W) float32 in [-1, 1], stretched to its bucket; caption, a str.

    Raises:
        ValueError: a file or a line is not as said, or a batch has pictures of several sizes.

    Example:
        >>> root = "datasets/t2i_toy_dataset"
        >>> data = CaptionedImages(root, f"{root}/bucket_sampler.json", f"{root}/data_info.jsonl")
        >>> batch = next(iter(data.sampler(batch_size=1, seed=0)))  # the file's own sizes
    """

    names = ("image", "caption")

    def __init__(
        self,
        root_dir: str | Path,
        packed_json: str | Path,
        jsonl_dir: str | Path,
        *,
        unit: int = UNIT,
        escape_captions: bool = False,
    ):
        unit = whole("unit", unit, 1)
        self.root_dir = existing("root_dir", root_dir, "folder")
        if not isinstance(escape_captions, bool):
            raise ValueError(f"escape_captions must be true or false, got {escape_captions!r}")
        self.escape_captions = escape_captions
        self._lines = JsonLines(jsonl_dir, partial(_checked_size, unit))
        self.sizes = self._lines.checked
        self.packs = Packs(packed_json, len(self))
        for number, pack in enumerate(self.packs):
            if len({*map(tuple, self.sizes[pack].tolist())}) > 1:
                raise ValueError(f"{packed_json}: batch {number} has pictures of several sizes")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Item:
        line = self._lines[index]
        image = pictures.read(self.root_dir / line["image_file"])
        height, width = self.sizes[index].tolist()
        caption = choice(line["captions"], index)
        return {
            "image": pictures.to_tensor(pictures.stretched(image, width, height)),
            "caption": escaped(caption) if self.escape_captions else caption,
        }

    def sampler(
        self, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> Sampler[list[Visit]]:
        """As TrainingSet's, of the batches of `packed_json`: `batch_size` is not used."""
        options = dict(seed=seed, start=start, rank=rank, world_size=world_size)
        return PackedSampler(self.packs, **options)


def _checked_size(unit: int, line: dict[str, Any]) -> tuple[int, int]:
    """(H, W) of a line's bucket, in px."""
    height, _, width = line["bucket"].rpartition("-")[2].partition("x")
    size = int(height) // unit * unit, int(width) // unit * unit
    captions = line["captions"]
    if not isinstance(line["image_file"], str) or min(size) < unit:
        raise ValueError(f"bucket must end in -HxW of at least {unit} px, got {line['bucket']!r}")
    if not (isinstance(captions, list) and captions and all(isinstance(c, str) for c in captions)):
        raise ValueError(f"captions must be a list of texts, got {captions!r}")
    return size
