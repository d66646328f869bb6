"""FID and CLIP score of MJHQ-30K samples (arXiv 2402.17245), overall and by category.

FID here is neither pytorch-fid's nor clean-fid's nor ADM's: pictures are resized by an antialiased
bilinear filter. A result names the networks and the preprocessing beside its numbers.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tim.checks import whole
from tim.data.files import some
from tim.data.prompts import PAGE, Prompt
from tim.data.prompts import mjhq as read_prompts
from tim.evaluation import report
from tim.evaluation.clip import cosines
from tim.evaluation.features import FeatureNetwork, Measured, Work, measure, work_folder
from tim.evaluation.pictures import Folder, npz_file
from tim.evaluation.reading import picture
from tim.evaluation.statistics import Moments, distance, frechet_distance
from tim.files import replacing
from tim.processes import Processes

_log = logging.getLogger(__name__)
METRICS = ("fid", "clip_score")
Statistics = tuple[Tensor, Tensor]  # mean and covariance
_SHOWN = 64  # pictures of a sheet


class ClipNetwork(FeatureNetwork, Protocol):
    """Unit features of pictures as `pool`, and of prompts (N, D)."""

    def texts(self, prompts: Sequence[str]) -> Tensor: ...


class _Number(NamedTuple):
    overall: float
    by_category: dict[str, float]


def evaluate(
    pictures: str | Path,
    meta_data: str | Path,
    *,
    reference: str | Path | None = None,
    inception: FeatureNetwork | None = None,
    clip: ClipNetwork | None = None,
    text_features: str | Path | None = None,
    output: str | Path | None = None,
    work: str | Path | None = None,
    batch_size: int = 64,
    leave_out: bool = False,
    convert: bool = False,
) -> dict[str, Any]:
    """Measure samples `CATEGORY/ID.jpg`; the result as `report.write` has it.

    Every process of torch.distributed's default group, if there is one, takes its share; all
    return the result. What was measured is kept in `work`, and a later run goes on from it.

    Args:
        pictures: the folder of category folders; any kind of picture file.
        meta_data: MJHQ's meta_data.json, which says what items there are.
        reference: MJHQ's own pictures in category folders, or an npz of their `mu` and `sigma`
            (FID is overall only, then). Given with `inception`, for FID.
        inception: `Inception(weights, "mjhq")`, or any network of one's own.
        clip: `Clip()`, or one's own, for the CLIP score.
        text_features: safetensors `CATEGORY/ID.jpg` → unit vector, in place of the features of
            the prompts in `meta_data`.
        output: a folder for `result.json` and sheets of pictures.
        work: the folder for features; by default `features` in that one.
        leave_out: go on without items that have no picture, pictures that are no item, and
            pictures that cannot be measured, and count them.
        convert: make grey, palette and transparent pictures RGB; else they cannot be measured.

    Raises:
        ValueError: a setting is wrong, or pictures are missing, of no item, or cannot be measured.
        FileNotFoundError: something given is not there.
    """
    if (reference is None) != (inception is None) or (inception is None and clip is None):
        raise ValueError("FID needs reference and inception, the CLIP score clip: give one or both")
    if text_features is not None and clip is None:
        raise ValueError("text_features are for the CLIP score, which needs clip")
    batch_size = whole("batch_size", batch_size, 1)
    prompts, samples, counts, real = check(
        pictures, meta_data, output, reference=reference, leave_out=leave_out, convert=convert
    )
    run = report.run_of(pictures)
    stored = None if text_features is None else _stored(text_features, samples.names)
    if work is None and output is not None:
        work = Path(output) / "features"
    options: dict[str, Any] = dict(batch_size=batch_size, leave_out=leave_out)
    with work_folder(work) as folder:
        seen: dict[str, Measured] = {}
        if inception is not None:
            seen["fid"] = measure(samples, inception, folder, label="samples", **options)
            if isinstance(real, Folder):
                real = measure(real, inception, folder, label="reference", **options)
        if clip is not None:
            seen["clip_score"] = measure(samples, clip, folder, label="CLIP", **options)
        result = None
        if Processes.here().is_first:
            numbers: dict[str, _Number] = {}
            if inception is not None:
                numbers["fid"] = _fid(seen["fid"], real)
            scores: dict[str, float] = {}
            if clip is not None:
                texts = stored or _texts(samples.names, prompts, clip, folder)
                scores = _scores(seen["clip_score"], texts)
                numbers["clip_score"] = _means(scores)
            if output is not None:
                _sheets(samples, next(iter(seen.values())).names, scores, prompts, Path(output))
            result = report.write(
                report.result_in(output), "mjhq",
                {name: number.overall for name, number in numbers.items()},
                settings={
                    "pictures": str(samples.path),
                    "reference": None if reference is None else str(reference),
                    "inception": _name(inception),
                    "clip": _name(clip),
                    "text_features": "of the prompts" if stored is None else str(text_features),
                    "grey_and_transparent": "made RGB" if convert else "refused",
                },
                counts=counts | _measured(samples, seen, real),
                breakdown={name: number.by_category for name, number in numbers.items()},
                run=run,
            )  # fmt: skip
        return Processes.here().gather(result)[0]


def check(
    pictures: str | Path, meta_data: str | Path, output: str | Path | None, *,
    reference: str | Path | None = None, leave_out: bool = False, convert: bool = False,
) -> tuple[dict[str, Prompt], Folder, dict[str, int], Folder | Statistics | None]:  # fmt: skip
    """What is given, opened; raises what `evaluate` would, before any network is loaded."""
    report.apart(output, pictures)
    prompts = {prompt.name: prompt for prompt in read_prompts(meta_data)}
    samples = Folder(pictures, convert=convert)
    report.run_of(pictures)
    counts = _items_alone(samples, prompts, leave_out)
    return prompts, samples, counts, None if reference is None else _reference(reference, convert)


def _measured(samples: Folder, seen: dict[str, Measured], real: Any) -> dict[str, int]:
    """How many samples and references were measured, and how many could not be."""
    bad = {each.name for measured in seen.values() for each in measured.bad}
    counts = {"pictures": len(samples.names) - len(bad), "left_out": len(bad)}
    if isinstance(real, Measured):
        there = {*map(_item, real.names)}
        if lacking := [item for item in map(_item, samples.names) if item not in there]:
            _log.warning(
                "the reference has no picture of %d of %d items: %s",
                len(lacking), len(samples.names), some(lacking),
            )  # fmt: skip
        counts |= {
            "reference_pictures": len(real.names), "reference_left_out": len(real.bad),
            "reference_missing": len(lacking),
        }  # fmt: skip
    return counts


def _name(network: FeatureNetwork | None) -> str | None:
    return None if network is None else getattr(network, "name", None) or type(network).__name__


def _item(name: str) -> str:
    """CATEGORY/ID of a picture's path."""
    return PurePath(name).with_suffix("").as_posix()


def _category(name: str) -> str:
    return PurePath(name).parts[0]


def _items_alone(samples: Folder, prompts: dict[str, Prompt], leave_out: bool) -> dict[str, int]:
    """Leave in `samples` the pictures of items; how many items and others there were.

    Raises:
        ValueError: there are others, items without a picture or with two, or no item at all.
    """
    found: dict[str, str] = {}
    others = []
    for name in samples.names:
        if (item := _item(name)) not in prompts:
            others.append(name)
        elif item in found:
            raise ValueError(f"two pictures of one item: {found[item]} and {name}")
        else:
            found[item] = name
    missing = [item for item in prompts if item not in found]
    where = f"{samples.path}:"
    if others and not leave_out:
        raise ValueError(
            f"{where} {len(others):,} pictures are no item: {some(others)}; --leave-out goes on "
            "without them"
        )
    if missing and (not leave_out or not found):
        raise ValueError(
            f"{where} fewer pictures than asked: {len(missing):,} of {len(prompts):,} items have "
            f"none: {some(missing)}; --leave-out measures the others"
        )
    samples.names = list(found.values())
    return {"asked": len(prompts), "missing": len(missing), "no_item": len(others)}


def _reference(path: str | Path, convert: bool) -> Folder | Statistics:
    """The folder, or mean and covariance."""
    if Path(path).is_dir() or Path(path).suffix.lower() != ".npz":
        return Folder(path, convert=convert)
    with np.load(npz_file(path)) as arrays:
        if not {"mu", "sigma"} <= {*arrays.files}:
            raise ValueError(f"{path} must hold mu and sigma, got {some(arrays.files)}: see {PAGE}")
        return torch.from_numpy(arrays["mu"]), torch.from_numpy(arrays["sigma"])


def _fid(samples: Measured, real: Measured | Statistics) -> _Number:
    ours = samples.moments_by(_category)
    if not isinstance(real, Measured):
        overall = _together(ours)
        return _Number(frechet_distance(overall.mean, overall.covariance, *real), {})
    theirs = real.moments_by(_category)
    small = [part for part in ours if min(ours[part].count, _count(theirs, part)) < 2]
    if small:
        _log.warning("no FID of %s: fewer than two pictures or references", some(small))
    return _Number(
        distance(_together(ours), _together(theirs)),
        {part: distance(ours[part], theirs[part]) for part in sorted({*ours} - {*small})},
    )


def _count(moments: dict[str, Moments], part: str) -> int:
    return moments[part].count if part in moments else 0


def _together(parts: dict[str, Moments]) -> Moments:
    total = Moments()
    for part in parts.values():
        total.update(part)
    return total


def _stored(path: str | Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Text features by item.

    Raises:
        ValueError: an item has none, or one is no unit vector.
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path} of text features: see {PAGE}")
    try:
        features = {_item(name): feature.float() for name, feature in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}; see {PAGE}") from error
    if missing := [item for item in map(_item, names) if item not in features]:
        raise ValueError(f"{path} has no feature of {len(missing):,} items: {some(missing)}")
    for item, feature in features.items():
        if feature.ndim != 1 or not abs(float(feature.norm()) - 1) < 1e-2:
            raise ValueError(f"{path}: {item} must be a unit vector, got {tuple(feature.shape)}")
    return features


def _texts(
    names: Sequence[str], prompts: dict[str, Prompt], clip: ClipNetwork, work: Work
) -> dict[str, Tensor]:
    """Features of the prompts by item, from the last run if they are there."""
    texts = {item: prompts[item].text for item in map(_item, names)}
    path = work.place(clip, json.dumps(texts))
    if not path.is_file():
        with replacing(path) as new:
            save_file({"texts": clip.texts(list(texts.values())).contiguous()}, new)
    return dict(zip(texts, load_file(path)["texts"], strict=True))


def _scores(seen: Measured, texts: dict[str, Tensor]) -> dict[str, float]:
    """The CLIP score of each picture by its path."""
    chosen = torch.stack([texts[_item(name)] for name in seen.names])
    agreement = 100 * cosines(seen.joined(), chosen)
    return dict(zip(seen.names, agreement.tolist(), strict=True))


def _means(scores: dict[str, float]) -> _Number:
    by_category: dict[str, list[float]] = {}
    for name, score in scores.items():
        by_category.setdefault(_category(name), []).append(score)
    return _Number(
        sum(scores.values()) / len(scores),
        {part: sum(each) / len(each) for part, each in sorted(by_category.items())},
    )


def _sheets(
    samples: Folder, names: Sequence[str], scores: dict[str, float], prompts: dict[str, Prompt],
    output: Path,
) -> None:  # fmt: skip
    """The first pictures, and where there are scores those that agree least and most with their
    prompts."""

    def labels(names: Sequence[str]) -> dict[str, str]:
        score = {name: f"{value:.1f} " for name, value in scores.items()}
        return {name: score.get(name, "") + prompts[_item(name)].text for name in names[:_SHOWN]}

    order = sorted(scores, key=scores.__getitem__)
    chosen = {"grid": labels(names), "worst": labels(order), "best": labels(order[::-1])}
    report.sheets(
        output, chosen, lambda names: [picture(samples.path / n, convert=True) for n in names]
    )
