"""Results side by side: a table, and steps against score beside the published figures."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tim.evaluation.report import table
from tim.files import replacing

_SOURCE = "TiM, arXiv 2509.04394"


class Figure(NamedTuple):
    """A published number."""

    benchmark: str
    size: int | None  # height = width, px; None of any
    metric: str
    value: float
    label: str


# The paper counts network evaluations; guided steps take two each.
PUBLISHED = (
    Figure("geneval", None, "overall", 0.67, "1 step"),
    Figure("geneval", None, "overall", 0.76, "4 guided steps"),
    Figure("geneval", None, "overall", 0.83, "64 guided steps"),
    Figure("imagenet", 256, "fid", 6.14, "1 step"),
    Figure("imagenet", 256, "fid", 1.65, "250 guided steps"),
    Figure("imagenet", 512, "fid", 4.79, "1 step"),
    Figure("imagenet", 512, "fid", 1.69, "250 guided steps"),
)
_DRAWN = {"geneval": "overall", "imagenet": "fid", "mjhq": "fid", "dpg": "dpg_score"}


class Result(NamedTuple):
    """What `tim evaluate` wrote."""

    name: str
    benchmark: str
    metrics: dict[str, float]
    generated: dict[str, Any]  # the settings that the pictures were made with

    @property
    def steps(self) -> int | None:
        return self.generated.get("num_steps")

    @property
    def size(self) -> int | None:
        height, width = self.generated.get("height"), self.generated.get("width")
        return height if height == width else None

    @property
    def curve(self) -> str:
        """Alike for results that differ in the number of steps alone."""
        checkpoint = self.generated.get("checkpoint")
        name = Path(str(checkpoint)).name.partition(".")[0] if checkpoint else self.name
        guidance = self.generated.get("cfg_scale")
        return name if guidance is None else f"{name}, guidance {guidance}"


def read(path: str | Path) -> Result:
    """A result of `tim evaluate`.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no result {path}: tim evaluate writes such files")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        benchmark, metrics = result["benchmark"], result["metrics"]
        generated = (result["run"] or {}).get("settings", {})
        numbers = {name: float(value) for name, value in metrics.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of tim evaluate: {error!r}") from error
    if benchmark not in _DRAWN:
        raise ValueError(f"{path}: benchmark must be one of {', '.join(_DRAWN)}, got {benchmark!r}")
    return Result(path.stem, benchmark, numbers, generated)


def published(results: Iterable[Result]) -> list[Figure]:
    """The published figures of these benchmarks, at these sizes of pictures."""
    asked = {(result.benchmark, size) for result in results for size in (None, result.size)}
    return [figure for figure in PUBLISHED if (figure.benchmark, figure.size) in asked]


def tables(results: Sequence[Result]) -> str:
    """A Markdown table a benchmark, the published figures at its end."""
    texts = []
    for benchmark, group in _by_benchmark(results).items():
        metrics = list(dict.fromkeys(name for result in group for name in result.metrics))
        rows = [
            [result.name, result.steps or "–", *(result.metrics.get(m, "–") for m in metrics)]
            for result in group
        ]
        rows += [
            [f"{_SOURCE}, {f.label}", "–", *(f.value if m == f.metric else "–" for m in metrics)]
            for f in published(group)
        ]
        texts.append(f"{benchmark}\n\n{table([benchmark, 'steps', *metrics], rows)}")
    return "\n\n".join(texts)


def plot(results: Sequence[Result], path: str | Path) -> None:
    """Steps against each benchmark's score as a PNG, the published figures as dotted lines.

    Raises:
        ValueError: no result says with how many steps its pictures were made.
    """
    from matplotlib.figure import Figure as Canvas

    groups = _by_benchmark([result for result in results if result.steps is not None])
    if not groups:
        raise ValueError(
            "no result says how many steps its pictures took: tim generate leaves a run.json "
            "beside them, which tim evaluate takes up"
        )
    canvas = Canvas(figsize=(6 * len(groups), 4), layout="constrained")
    for axes, (benchmark, group) in zip(
        canvas.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
    ):
        metric = _DRAWN[benchmark]
        ticks = sorted({result.steps for result in group})
        for curve in dict.fromkeys(result.curve for result in group):
            points = sorted((r.steps, r.metrics[metric]) for r in group if r.curve == curve)
            axes.plot(*zip(*points, strict=True), marker="o", label=curve)
        for figure in published(group):
            axes.axhline(figure.value, color="grey", ls=":")
            axes.annotate(
                f"{figure.value:g} at {figure.label}, {_SOURCE}", (1, figure.value),
                xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set(xlabel="sampling steps", ylabel=f"{benchmark}: {metric}")
        axes.set(xticks=ticks, xticklabels=ticks)
        axes.legend(fontsize=8)
    with replacing(path) as new:
        canvas.savefig(new, dpi=120, format="png")


def _by_benchmark(results: Sequence[Result]) -> Mapping[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        if _DRAWN[result.benchmark] not in result.metrics:
            raise ValueError(
                f"{result.name} has no {_DRAWN[result.benchmark]}, got {', '.join(result.metrics)}"
            )
        groups.setdefault(result.benchmark, []).append(result)
    return groups
