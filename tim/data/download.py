"""What is published on the Hugging Face hub, fetched to where the configurations look for it."""

import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from huggingface_hub import constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from huggingface_hub.file_download import repo_folder_name
from tqdm import tqdm

from tim.checks import closest
from tim.data.base import reading
from tim.data.files import some
from tim.files import replacing

_ARCHIVES = (".zip", ".tar.gz")


@dataclass(frozen=True)
class Part:
    """Files of one hub repository.

    Attributes:
        files: their names in the repository, or patterns with `*`.
        folder: where they lie, from the root; None is the hub's own cache.
        is_dataset: else a model.
    """

    repo: str
    files: tuple[str, ...]
    folder: str | None
    licence: str
    is_dataset: bool = False

    @property
    def kind(self) -> str:
        return "dataset" if self.is_dataset else "model"

    def expected(self, root: str | Path) -> Path:
        """Where `files` must lie, or of the hub's cache the folder that holds them."""
        if self.folder is None:
            name = repo_folder_name(repo_id=self.repo, repo_type=self.kind)
            return Path(constants.HF_HUB_CACHE, name)
        return Path(root, self.folder)

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{'datasets/' * self.is_dataset}{self.repo}"

    def place(self, root: str | Path) -> Path | None:
        """The folder that `files` are in; None before the hub's cache has any."""
        if self.folder is not None:
            return Path(root, self.folder)
        config = try_to_load_from_cache(self.repo, "config.json", repo_type=self.kind)
        return Path(config).parent if isinstance(config, str) else None

    def missing(self, root: str | Path) -> list[str]:
        """Which of `files` are not there; those of archives are counted and their bytes summed."""
        place = self.place(root)
        if place is None:
            return list(self.files)
        return [
            name
            for name in self.files
            if not (
                _is_unpacked(place, name) if name.endswith(_ARCHIVES) else any(place.glob(name))
            )
        ]


# The archives are named by their first and last class.
_TWENTY = """\
n01440764_n01697457 n01698640_n01855672 n01860187_n02074367 n02077923_n02097298
n02097474_n02110063 n02110185_n02138441 n02165105_n02415577 n02417914_n02667093
n02669723_n02859443 n02860847_n03041632 n03042490_n03291819 n03297495_n03530642
n03532672_n03743016 n03759954_n03884397 n03887697_n04033901 n04033995_n04239074
n04243546_n04398044 n04399382_n04560804 n04562935_n07745940 n07747607_n15075141"""
_TEN = """\
n01440764_n01855672 n01860187_n02097298 n02097474_n02138441 n02165105_n02667093
n02669723_n03041632 n03042490_n03530642 n03532672_n03884397 n03887697_n04239074
n04243546_n04560804 n04562935_n15075141"""


def _imagenet(folder: str, archives: str, *others: str) -> list[Part]:
    files = tuple(f"{folder}/{name}.zip" for name in archives.split())
    return [
        Part(
            "GoodEnough/NiT-Preprocessed-ImageNet1K", (*others, *files), "datasets/imagenet1k",
            "ImageNet's terms, non-commercial research (https://image-net.org/download)", True,
        )
    ]  # fmt: skip


_WEIGHTS = ("config.json", "diffusion_pytorch_model.safetensors")
SETS: dict[str, list[Part]] = {
    "imagenet-256": _imagenet("sd-vae-ft-ema-256x256", _TWENTY),
    "imagenet-512": _imagenet("dc-ae-f32c32-sana-1.1-diffusers-512x512", _TWENTY),
    "imagenet-native": _imagenet(
        "dc-ae-f32c32-sana-1.1-diffusers-native-resolution", _TEN,
        "data_meta/*.jsonl", "sampler_meta/*.json",
    ),
    "t2i-toy": [
        Part(
            "GoodEnough/TiM-Toy-T2I-Dataset",
            (
                "bucket_categorization.json", "bucket_sampler.json", "data_info.jsonl",
                "get_sampler.py", "dataset.tar.gz",
            ),
            "datasets/t2i_toy_dataset", "see its page", True,
        ),
    ],
    "weights": [
        Part(
            "GoodEnough/TiM-C2I", ("c2i_model_256.safetensors", "c2i_model_512.safetensors"),
            "checkpoints", "see its page; the published code is Apache-2.0",
        ),
        Part(
            "GoodEnough/TiM-T2I", ("t2i_model.bin",), "checkpoints",
            "see its page; the published code is Apache-2.0",
        ),
        Part("stabilityai/sd-vae-ft-ema", _WEIGHTS, None, "MIT"),
        Part("mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers", _WEIGHTS, None, "see its page"),
        Part(
            "nvidia/RADIO", ("radio-v2.5-b_half.pth.tar",), "checkpoints/radio",
            "NVIDIA's for the weights of RADIO: not for commercial use",
        ),
        Part(
            "google/gemma-3-1b-it", ("*.json", "*.safetensors", "tokenizer.model"), None,
            "Gemma terms of use: accept them on its page, then `hf auth login` or HF_TOKEN",
        ),
    ],
}  # fmt: skip
_IMAGENET_PICTURES = (
    "The pictures, which REPA reads too, are not on the hub: ILSVRC2012's training set, from "
    "https://image-net.org/download (free for research, after registration), goes into "
    "datasets/imagenet1k/images/train/nXXXXXXXX/*.JPEG"
)
NOTES = {name: _IMAGENET_PICTURES for name in SETS if name.startswith("imagenet")}


def download(what: str, root: str | Path = ".", say: Callable[[str], None] = print) -> None:
    """Fetch what is missing, and check what is there.

    A line that breaks goes on where it was; what a stopped run has whole, stays. Archives are
    unpacked where they lie and deleted. Without network, files put there by hand are taken as they
    are. `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are huggingface_hub's.

    Args:
        what: one of `SETS`.
        root: where `datasets` and `checkpoints` are, which configurations expect in the working
            directory.
        say: gets lines of text: licences, what is there.

    Raises:
        ValueError: there is no such set.
        OSError: something cannot be fetched or unpacked; the message says what to put where.
    """
    for part in _parts(what):
        missing = part.missing(root)
        if missing:
            say(f"{part.repo}: licence: {part.licence}; {part.url}")
        # What is unpacked is whole; other files are compared with the hub's.
        wanted = [name for name in part.files if name in missing or not name.endswith(_ARCHIVES)]
        try:
            _fetch(part, wanted, root)
        except (OSError, HTTPError) as error:
            raise OSError(_without_network(what, part, part.missing(root), root, error)) from error
        if missing := part.missing(root):
            raise OSError(_without_network(what, part, missing, root, "the hub has none of them"))
        say(f"{part.repo}: {len(part.files)} of {len(part.files)} in {part.place(root)}")
    if what in NOTES:
        say(NOTES[what])


def listing(what: str, root: str | Path = ".") -> Iterator[str]:
    """Lines that say, for a run without network, which files must lie where, and which do.

    Raises:
        ValueError: there is no such set.
    """
    for part in _parts(what):
        as_cached = ", laid out as the hub's cache" * (part.folder is None)
        yield f"{part.url} → {part.expected(root)}{as_cached}"
        yield f"  licence: {part.licence}"
        missing = part.missing(root)
        yield from (
            f"  {'missing' if name in missing else 'there  '} {name}" for name in part.files
        )
    if what in NOTES:
        yield NOTES[what]


def _parts(what: str) -> list[Part]:
    if what not in SETS:
        raise ValueError(
            f"what must be one of {', '.join(SETS)}, got {what!r}{closest(what, SETS)}"
        )
    return SETS[what]


def _fetch(part: Part, names: list[str], root: str | Path) -> None:
    place = None if part.folder is None else Path(root, part.folder)
    if patterns := [name for name in names if place is None or "*" in name]:
        snapshot_download(part.repo, repo_type=part.kind, allow_patterns=patterns, local_dir=place)
    for name in names:
        if place is not None and name not in patterns:
            path = hf_hub_download(part.repo, name, repo_type=part.kind, local_dir=place)
            if name.endswith(_ARCHIVES):
                _unpack(Path(path), place, name)


def _without_network(
    what: str, part: Part, missing: list[str], root: str | Path, reason: Exception | str
) -> str:
    how = "from" if part.folder else "laid out as the hub's cache of another machine, or from"
    return (
        f"{part.repo}: {len(missing)} of {len(part.files)} files are missing: {some(missing)}; "
        f"without network put them into {part.expected(root)}, {how} {part.url} (`tim download "
        f"{what} --list` names all): {' '.join(str(reason).split())}"
    )


# An archive's record, written when it is unpacked: {folder: [files, bytes]}.


def _record(place: Path, archive: str) -> Path:
    return place / ".unpacked" / f"{archive}.json"


def _is_unpacked(place: Path, archive: str) -> bool:
    record = _record(place, archive)
    if not record.is_file():
        return False
    for folder, (count, total) in json.loads(record.read_text()).items():
        path = place / folder
        sizes = [f.stat().st_size for f in os.scandir(path) if f.is_file()] if path.is_dir() else []
        if len(sizes) < count or sum(sizes) < total:
            return False
    return True


def _unpack(path: Path, place: Path, archive: str) -> None:
    """Over what is there of an earlier try; the record and then the archive's end come last."""
    counts: dict[str, list[int]] = {}
    with reading(f"{path}, which may be deleted and fetched again"):
        for name, file in tqdm(_members(path), desc=path.name, unit="files"):
            # In a zip of latents what is above class/name.safetensors does not matter.
            parts = PurePosixPath(name).parts[-2:] if archive.endswith(".zip") else (name,)
            target = PurePosixPath(archive).parent.joinpath(*parts)
            if ".." in target.parts or target.is_absolute():
                raise ValueError(f"{name} leads out of its folder")
            (place / target).parent.mkdir(parents=True, exist_ok=True)
            with (place / target).open("wb") as new:
                shutil.copyfileobj(file, new)
                count = counts.setdefault(str(target.parent), [0, 0])
                count[0], count[1] = count[0] + 1, count[1] + new.tell()
        if not counts:
            raise ValueError("it is empty")
    os.sync()  # once, not for each of a hundred thousand
    with replacing(_record(place, archive)) as new:
        new.write_text(json.dumps(counts))
    path.unlink()


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Names and contents of an archive's files."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as pack:
            for info in pack.infolist():
                if not info.is_dir():
                    with pack.open(info) as file:
                        yield info.filename, file
        return
    with tarfile.open(path) as pack:
        for member in pack:
            if not member.isdir():
                content = pack.extractfile(member)  # of a link what it leads to
                if content is None:
                    raise ValueError(f"{member.name} is no file")
                yield member.name, content
