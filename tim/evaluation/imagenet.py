"""FID, sFID, Inception score, precision and recall of ImageNet samples, as ADM's suite has them.

A number is comparable with published ones where the reference is ADM's file for that size, the
network Inception-v3 with ADM's preprocessing, and the pictures 50,000.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tim.checks import whole
from tim.data.prompts import PAGE
from tim.evaluation import report
from tim.evaluation.features import FeatureNetwork, Measured, Work, measure, work_folder
from tim.evaluation.pictures import Npz, Pictures, npz_checksum, npz_file, opened
from tim.evaluation.scores import PrecisionRecall, inception_score, precision_recall
from tim.evaluation.statistics import frechet_distance
from tim.processes import Processes

METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
_STATISTICS = {"fid": ("mu", "sigma", "pool"), "sfid": ("mu_s", "sigma_s", "spatial")}
_SHOWN = 64  # pictures of a sheet
_ORDER_SEED = 0


def evaluate(
    pictures: str | Path | Pictures | Iterable[Tensor],
    reference: str | Path,
    network: FeatureNetwork,
    *,
    count: int = 50_000,
    metrics: Sequence[str] = METRICS,
    output: str | Path | None = None,
    work: str | Path | None = None,
    batch_size: int = 64,
    split: int = 5000,
    k: int = 3,
    leave_out: bool = False,
    convert: bool = False,
) -> dict[str, Any]:
    """Measure samples against a reference file; the result as `report.write` has it.

    Every process of torch.distributed's default group, if there is one, takes its share; all
    return the result. What was measured is kept in `work`, and a later run goes on from it.

    Args:
        pictures: a folder (taken in the numeric order of the names), an npz with `arr_0` uint8
            (N, H, W, 3), or what yields uint8 (3, H, W) or (n, 3, H, W).
        reference: an npz as ADM gives: `mu`, `sigma`, `mu_s`, `sigma_s` for FID and sFID, and
            pictures `arr_0` for precision and recall.
        network: `inception.Inception`, or any network of one's own.
        count: the first so many are measured; fewer are refused.
        metrics: some of METRICS.
        output: a folder for `result.json` and sheets of pictures.
        work: the folder for features; by default `features` in that one.
        split: pictures of one split of the Inception score. Only whole splits count, of pictures
            in a random order (seed 0); fewer pictures are one split of all.
        k: the neighbour that gives precision and recall their radius.
        leave_out: go on without pictures that cannot be measured, and count them.
        convert: make grey, palette and transparent pictures RGB; else they cannot be measured.

    Raises:
        ValueError: a setting is wrong, pictures are too few or cannot be measured, the reference
            lacks something, or the network does.
        FileNotFoundError: the pictures or the reference are not there.
    """
    count, split = whole("count", count, 1), whole("split", split, 1)
    batch_size, k = whole("batch_size", batch_size, 1), whole("k", k, 1)
    source, wanted = check(
        pictures, reference, output, count=count, metrics=metrics, convert=convert
    )
    path = getattr(source, "path", None)
    run = None if path is None else report.run_of(path)
    if work is None and output is not None:
        work = Path(output) / "features"
    with work_folder(work) as folder:
        samples = measure(
            source, network, folder,
            count=count, batch_size=batch_size, leave_out=leave_out, label="samples",
        )  # fmt: skip
        real = wanted.measured(network, folder, batch_size)
        result = None
        if Processes.here().is_first:
            scores = _Scores.of(samples, real, wanted.statistics, metrics, split, k, network)
            if output is not None:
                _sheets(source, samples, scores.balls, Path(output))
            result = report.write(
                report.result_in(output), "imagenet", scores.values,
                settings={
                    "network": getattr(network, "name", None) or type(network).__name__,
                    "pictures": "an iterator" if path is None else str(path),
                    "reference": Path(reference).name,
                    "reference_checksum": npz_checksum(reference),
                    "grey_and_transparent": "made RGB" if convert else "refused",
                    "inception_score_order": f"random, seed {_ORDER_SEED}",
                    "inception_score_split": split,
                    "neighbour": k,
                    "distances": "float64",
                },
                counts={
                    **scores.counts, "asked": count, "left_out": len(samples.bad),
                    "not_used": len(source.names) - count,
                },
                run=run,
            )  # fmt: skip
        return Processes.here().gather(result)[0]


def check(
    pictures: str | Path | Pictures | Iterable[Tensor], reference: str | Path,
    output: str | Path | None, *, count: int = 50_000, metrics: Sequence[str] = METRICS,
    convert: bool = False,
) -> tuple[Pictures, "_Reference"]:  # fmt: skip
    """What is given, opened; raises what `evaluate` would, before any network is loaded."""
    if not metrics or not {*metrics} <= {*METRICS}:
        raise ValueError(f"metrics must be some of {', '.join(METRICS)}, got {', '.join(metrics)}")
    source = opened(pictures, whole("count", count, 1), convert=convert)
    if (path := getattr(source, "path", None)) is not None:
        report.apart(output, path)
        report.run_of(path)
    return source, _Reference(reference, metrics)


class _Reference:
    """The arrays of a reference file that the metrics need."""

    def __init__(self, path: str | Path, metrics: Sequence[str]):
        self.path = npz_file(path)
        needed = {name: kind[:2] for name, kind in _STATISTICS.items() if name in metrics}
        with np.load(self.path) as arrays:
            lacking = sorted({key for keys in needed.values() for key in keys} - {*arrays.files})
            if lacking:
                raise ValueError(
                    f"{path} lacks {', '.join(lacking)}, which {' and '.join(needed)} need: "
                    f"see {PAGE}"
                )
            self.statistics = {
                name: tuple(torch.from_numpy(arrays[key]).double() for key in keys)
                for name, keys in needed.items()
            }
        self.pictures = Npz(self.path) if {"precision", "recall"} & {*metrics} else None

    def measured(self, network: FeatureNetwork, work: Work, batch_size: int) -> Measured | None:
        if self.pictures is None:
            return None
        return measure(self.pictures, network, work, batch_size=batch_size, label="reference")


class _Scores(NamedTuple):
    values: dict[str, float]
    counts: dict[str, int]
    balls: PrecisionRecall | None

    @classmethod
    def of(
        cls, samples: Measured, real: Measured | None, statistics: dict[str, tuple[Tensor, ...]],
        metrics: Sequence[str], split: int, k: int, network: FeatureNetwork,
    ) -> "_Scores":  # fmt: skip
        _check_kinds(samples, metrics)
        values: dict[str, float] = {}
        counts, balls = {"pictures": len(samples.names)}, None
        for name, reference in statistics.items():
            moments = samples.moments(_STATISTICS[name][2])
            values[name] = frechet_distance(moments.mean, moments.covariance, *reference)
        if "inception_score" in metrics:
            logits = _in_whole_splits(samples.joined("logits"), split)
            counts |= {"in_splits": len(logits), "splits": max(1, len(logits) // split)}
            values["inception_score"] = inception_score(logits, counts["splits"])
        if real is not None:
            device = getattr(network, "device", "cpu")
            pools = (each.joined("pool").to(device) for each in (real, samples))
            balls = precision_recall(*pools, k)
            values |= {"precision": balls.precision, "recall": balls.recall}
            counts["reference_pictures"] = len(real.names)
        return cls({name: values[name] for name in METRICS if name in metrics}, counts, balls)


def _check_kinds(samples: Measured, metrics: Sequence[str]) -> None:
    first = next(iter(samples))
    for name, kind in (("sfid", "spatial"), ("inception_score", "logits")):
        if name in metrics and getattr(first, kind) is None:
            raise ValueError(f"{name} needs {kind} features, which this network does not give")


def _in_whole_splits(logits: Tensor, split: int) -> Tensor:
    """The rows in a random order, as many as make whole splits; all where there is not one."""
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(_ORDER_SEED))
    return logits[order[: max(1, len(logits) // split) * split]]


def _sheets(
    source: Pictures, samples: Measured, balls: PrecisionRecall | None, output: Path
) -> None:
    """The first pictures, and those least and most like the reference, beside the result."""
    if not hasattr(source, "path"):  # what was yielded is gone
        return
    places = {name: place for place, name in enumerate(source.names)}

    def read(names: Sequence[str]) -> list[Image.Image]:
        ascending = sorted(names, key=places.__getitem__)
        found = source.read(map(places.__getitem__, ascending))
        shown = dict(zip(ascending, found, strict=True))
        return [Image.fromarray(shown[name].movedim(0, -1).numpy()) for name in names]

    chosen = {"grid": {name: name for name in samples.names[:_SHOWN]}}
    if balls is not None:
        order = balls.realism.argsort().tolist()
        for title, picked in (("worst", order[:_SHOWN]), ("best", order[::-1][:_SHOWN])):
            names = [samples.names[i] for i in picked]
            realism = balls.realism[picked].tolist()
            chosen[title] = {f: f"{f} {value:.2f}" for f, value in zip(names, realism, strict=True)}
    report.sheets(output, chosen, read)
