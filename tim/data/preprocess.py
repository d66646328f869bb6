"""Latents of a folder of pictures, made once, by as many processes as there are."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from tim.checks import check_computed, whole
from tim.data import pictures
from tim.data.base import UnreadableError, reading
from tim.data.files import Names, class_pictures, existing, some
from tim.data.latent_images import latent_files
from tim.data.native_latents import NATIVE
from tim.data.packing import longest_first
from tim.files import filling, locked, replacing
from tim.processes import Processes
from tim.provenance import weights_hash

T = TypeVar("T")
_log = logging.getLogger(__name__)
_WINDOW = 16  # batches whose pictures are sorted by size
_AHEAD = 3  # batches that are read before they are needed


class Autoencoder(Protocol):
    """What is used of a `tim.encoders.Autoencoder`."""

    model: torch.nn.Module
    factor: int

    def encode(self, images: Tensor, generator: list[torch.Generator]) -> Tensor: ...


@dataclass
class Made:
    """What came of it, in all processes.

    Attributes:
        new: latents made.
        there: latents found whole.
        unreadable: why the others could not be made, a line a picture.
        sizes: (N, 3) of every latent: its place in the list, its picture's width and height.
    """

    new: int = 0
    there: int = 0
    unreadable: list[str] = field(default_factory=list)
    sizes: np.ndarray = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))

    @classmethod
    def together(cls, parts: list["Made"]) -> "Made":
        sizes = np.concatenate([part.sizes for part in parts])
        return cls(
            sum(part.new for part in parts), sum(part.there for part in parts),
            sorted(line for part in parts for line in part.unreadable),
            sizes[np.argsort(sizes[:, 0])],
        )  # fmt: skip


def preprocess(
    image_dir: str | Path,
    latent_dir: str | Path,
    autoencoder: Autoencoder,
    *,
    image_size: int | None = None,
    min_image_size: int = 32,
    max_image_size: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
    num_workers: int = 4,
    pack_tokens: int | None = None,
    most_unreadable: float = 0.01,
) -> Made:
    """Make the latents of every picture and of its mirror image, each encoded itself.

    Writes `latent_dir/class/name.safetensors` with `latent` (2, C, H/factor, W/factor) float32,
    scaled, and `label` () float32, the place of the sorted class folder, for `LatentImages`; and
    `latent_dir/metadata.jsonl`, a line a latent, for `NativeLatents`.

    Every process of torch.distributed's default group, if there is one, takes its share. Latents
    that are there and whole are left as they are. Batches are always the same, and what the
    autoencoder draws is keyed by `seed` and the latent's path: on one kind of device a latent's
    bits depend neither on who makes it nor on when.

    Args:
        image_dir: class folders of pictures, taken as stored, not turned as their camera says.
        image_size: side of the square that is cut out of the middle, in px; None is the native
            size: sides cut to multiples of `min_image_size`, the area to `max_image_size`²
            (`tim.data.pictures.native_size`).
        batch_size: pictures of one size that are encoded at once.
        num_workers: threads that read and write.
        pack_tokens: also write `packs-{pack_tokens}.json`, batches for `NativeLatents` of at most
            so many positions of latents.
        most_unreadable: the share of pictures (counted as 1000 at least) that may be unreadable.
            They are named in warnings.

    Raises:
        ValueError: a setting is wrong, or the latents there were made with others.
        BlockingIOError: another run writes to `latent_dir`.
        UnreadableError: all is done, but for more than `most_unreadable`.

    Example::

        autoencoder = tim.encoders.Autoencoder.load("stabilityai/sd-vae-ft-ema", device="cuda")
        preprocess("imagenet/train", "latents", autoencoder, image_size=256, batch_size=64)
    """
    if pack_tokens is not None:
        whole("pack_tokens", pack_tokens, 1)
    job = _Job(
        existing("image_dir", image_dir, "folder"), Path(latent_dir), autoencoder,
        image_size, min_image_size, max_image_size, whole("batch_size", batch_size, 1),
        whole("seed", seed, 0), whole("num_workers", num_workers, 1),
    )  # fmt: skip
    processes = Processes.here()
    job.latent_dir.mkdir(parents=True, exist_ok=True)
    with locked(job.latent_dir) if processes.is_first else contextlib.nullcontext():
        if processes.is_first:
            job.prepare()
        processes.wait()
        made = Made.together(processes.gather(job.run(*processes)))
        if processes.is_first:
            job.write_metadata(made.sizes, pack_tokens)
        processes.wait()
    if len(made.unreadable) > most_unreadable * max(len(job.images), 1000):
        raise UnreadableError(
            f"{len(made.unreadable)} of {len(job.images)} pictures cannot be read, more than "
            f"{most_unreadable:.2g}: {some(made.unreadable)}"
        )
    return made


class _Picture(NamedTuple):
    place: int  # in the list
    original: tuple[int, int]  # width and height
    size: tuple[int, int]  # that are encoded


@dataclass
class _Job:
    image_dir: Path
    latent_dir: Path
    autoencoder: Autoencoder
    image_size: int | None
    min_image_size: int
    max_image_size: int
    batch_size: int
    seed: int
    num_workers: int

    def __post_init__(self):
        name = "min_image_size" if self.image_size is None else "image_size"
        size, self.factor = whole(name, getattr(self, name), 1), self.autoencoder.factor
        if size % self.factor:
            raise ValueError(f"{name} must be a multiple of {self.factor} px, got {size}")
        if whole("max_image_size", self.max_image_size) < self.min_image_size:
            raise ValueError(
                f"max_image_size must be at least min_image_size, got {self.max_image_size}"
            )
        found = class_pictures(self.image_dir)
        self.images = Names(file for files in found.values() for file in files)
        self.latents = Names(
            latent for name, files in found.items() for latent in latent_files(name, files)
        )
        self.labels = np.repeat(np.arange(len(found)), [len(files) for files in found.values()])
        parameter = next(self.autoencoder.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def prepare(self) -> None:
        """Hold on to the settings that are there; remove what a killed run left half."""
        settings = {
            "image_size": self.image_size or [self.min_image_size, self.max_image_size],
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "autoencoder": weights_hash(self.autoencoder.model),
        }
        path = self.latent_dir / "preprocess.json"
        if path.is_file():
            with reading(path):
                before = json.loads(path.read_text())
                wrong = [f"{k} {before[k]}, not {v}" for k, v in settings.items() if before[k] != v]
            if wrong:
                raise ValueError(f"the latents of {self.latent_dir} are of {', '.join(wrong)}")
        for left in self.latent_dir.glob(".partial-*"):
            shutil.rmtree(left)
        with replacing(path) as new:
            new.write_text(json.dumps(settings))

    def run(self, rank: int, world_size: int) -> Made:
        """Its share of the list."""
        window = self.batch_size * (_WINDOW if self.image_size is None else 1)
        starts = range(rank * window, len(self.images), world_size * window)
        share = sum(min(window, len(self.images) - start) for start in starts)
        made = Made()
        sizes: list[tuple[int, int, int]] = []
        writes: deque[Future[None]] = deque()
        pool = ThreadPoolExecutor(self.num_workers)
        bar = tqdm(
            total=share, unit=" pictures", disable=rank > 0, smoothing=0.05,
            desc=f"process 1 of {world_size}" if world_size > 1 else None,
        )  # fmt: skip

        def failed(error: UnreadableError) -> None:
            _log.warning("cannot be read: %s", error)
            made.unreadable.append(str(error))
            bar.update()

        try:
            for batch, missing, reads in _ahead(self._batches(pool, starts, window, failed)):
                if missing:
                    read = [(picture, done.result()) for picture, done in reads.items()]
                    for _, image in read:
                        if isinstance(image, UnreadableError):
                            failed(image)
                    images = {p: image for p, image in read if isinstance(image, Tensor)}
                    batch = list(images)
                    new = self._encoded(images, missing) if images else {}
                    if new:
                        writes.append(pool.submit(self._write, new))
                    made.new += len(new)
                    while len(writes) > self.num_workers:
                        writes.popleft().result()
                made.there += sum(picture not in missing for picture in batch)
                sizes.extend((picture.place, *picture.original) for picture in batch)
                bar.update(len(batch))
            for write in writes:
                write.result()
        finally:
            bar.close()
            pool.shutdown(cancel_futures=True)
        made.sizes = np.array(sizes, dtype=np.int64).reshape(-1, 3)
        return made

    def _batches(
        self,
        pool: ThreadPoolExecutor,
        starts: Iterable[int],
        window: int,
        failed: Callable[[UnreadableError], None],
    ) -> Iterator[tuple[list[_Picture], set[_Picture], dict[_Picture, Future]]]:
        """Pictures of one size, those without a latent and, if there are any, all that is read."""
        for start in starts:
            indices = range(start, min(start + window, len(self.images)))
            by_size = defaultdict(list)
            for picture in pool.map(self._measured, indices):
                if isinstance(picture, UnreadableError):
                    failed(picture)
                else:
                    by_size[picture.size].append(picture)
            for group in by_size.values():
                for at in range(0, len(group), self.batch_size):
                    batch = group[at : at + self.batch_size]
                    is_there = pool.map(self._is_there, batch)
                    missing = {p for p, there in zip(batch, is_there, strict=True) if not there}
                    reads = {p: pool.submit(self._read, p) for p in batch} if missing else {}
                    yield batch, missing, reads

    def _measured(self, index: int) -> _Picture | UnreadableError:
        path = self.image_dir / self.images[index]
        try:
            with reading(path), Image.open(path) as image:
                original = image.size
        except UnreadableError as error:
            return error
        return _Picture(index, original, self._size(*original))

    def _size(self, width: int, height: int) -> tuple[int, int]:
        if self.image_size is not None:
            return self.image_size, self.image_size
        limits = dict(unit=self.min_image_size, most=self.max_image_size)
        return pictures.native_size(width, height, **limits)

    def _is_there(self, picture: _Picture) -> bool:
        """Whole, and of this size and label."""
        path = self.latent_dir / self.latents[picture.place]
        width, height = (side // self.factor for side in picture.size)
        try:
            with reading(path), safe_open(path, "pt") as file:
                shape = file.get_slice("latent").get_shape()
                label = file.get_tensor("label")
        except UnreadableError:
            return False
        wanted = self.labels[picture.place]
        return shape[:1] + shape[2:] == [2, height, width] and label.tolist() == wanted

    def _read(self, picture: _Picture) -> Tensor | UnreadableError:
        try:
            image = pictures.read(self.image_dir / self.images[picture.place])
        except UnreadableError as error:
            return error
        if self.image_size is None:
            return pictures.to_tensor(pictures.stretched(image, *picture.size))
        return pictures.to_tensor(pictures.centre_crop(image, self.image_size))

    def _encoded(
        self, images: dict[_Picture, Tensor], missing: set[_Picture]
    ) -> dict[_Picture, Tensor]:
        """Latents (2, C, h, w) of those that are missing; the others make the batch the same."""
        x = torch.stack(list(images.values())).to(self.device)
        draws = [self._generator(picture.place) for picture in images]
        both = [self.autoencoder.encode(each, draws) for each in (x, x.flip(-1))]
        latents = torch.stack(both, dim=1).float().cpu().contiguous()
        check_computed("latents", latents, "the autoencoder", self.dtype)
        return {p: z for p, z in zip(images, latents, strict=True) if p in missing}

    def _generator(self, index: int) -> torch.Generator:
        digest = hashlib.sha256(os.fsencode(f"{self.seed} {self.latents[index]}")).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def _write(self, latents: dict[_Picture, Tensor]) -> None:
        with filling(self.latent_dir) as folder:
            for picture, latent in latents.items():
                path = folder / self.latents[picture.place]
                path.parent.mkdir(parents=True, exist_ok=True)
                label = torch.tensor(float(self.labels[picture.place]))
                save_file({"latent": latent, "label": label}, path)

    def write_metadata(self, sizes: np.ndarray, pack_tokens: int | None) -> None:
        """What `NativeLatents` reads, of the latents (N, 3) in the list's order."""
        lengths = []
        with replacing(self.latent_dir / "metadata.jsonl") as path, path.open("w") as file:
            for index, *original in sizes.tolist():
                width, height = self._size(*original)
                w, h = width // self.factor, height // self.factor
                lengths.append(h * w)
                line = {
                    "image_file": self.images[index], "latent_file": self.latents[index],
                    "ori_w": original[0], "ori_h": original[1], "latent_h": h, "latent_w": w,
                    "image_h": height, "image_w": width,
                    "type": f"fixed-{width}x{height}" if self.image_size else NATIVE,
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")
        if pack_tokens is not None:
            packs = longest_first(lengths, pack_tokens)
            with replacing(self.latent_dir / f"packs-{pack_tokens}.json") as path:
                path.write_text(json.dumps(packs))


def _ahead(batches: Iterable[T]) -> Iterator[T]:
    """Asks for a few before the first is needed."""
    queue: deque[T] = deque()
    for batch in batches:
        queue.append(batch)
        if len(queue) > _AHEAD:
            yield queue.popleft()
    yield from queue
