"""Results of one benchmark side by side, over the number of sampling steps, as table and plot."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tim.checks import closest
from tim.evaluation import report
from tim.files import replacing

SOURCE = "arXiv 2509.04394"
# Steps → value, by benchmark, metric and the side of its pictures in px (None is any). A single
# step is not guided, more are: 4 and 64 are what the paper calls 8 and 128 evaluations.
PUBLISHED: dict[tuple[str, str, int | None], dict[int, float]] = {
    ("geneval", "overall", None): {1: 0.67, 4: 0.76, 64: 0.83},
    ("imagenet", "fid", 256): {1: 6.14, 250: 1.65},
    ("imagenet", "fid", 512): {1: 4.79, 250: 1.69},
}
_PLACES = ("pictures", "reference", "text_features")  # settings that are paths


class Result(NamedTuple):
    """One result, and where it stands."""

    label: str
    steps: int
    content: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        return self.content["metrics"]


def read(
    paths: Sequence[str | Path], *, labels: Sequence[str] = (), steps: Sequence[int] = ()
) -> list[Result]:
    """Results that `report.write` wrote, by label and steps.

    Args:
        paths: the JSON files, or the folders that they are in.
        labels: one each, the same for those of one line; by default the run's guidance.
        steps: one each, where the pictures' run.json does not say.

    Raises:
        ValueError: the files are no results, or of several benchmarks; labels or steps are not
            one each; or nobody says of how many steps a result is.
        FileNotFoundError: there is no such file.
    """
    for name, given in (("labels", labels), ("steps", steps)):
        if given and len(given) != len(paths):
            raise ValueError(f"{len(paths)} results need as many {name}, got {len(given)}")
    results = []
    for place, path in enumerate(map(Path, paths)):
        content = _content(path)
        settings = (content["run"] or {}).get("settings", {})
        count = steps[place] if steps else settings.get("num_steps")
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{path} does not say its number of steps: give --steps of each")
        label = labels[place] if labels else _label(content["run"] or {})
        results.append(Result(label, count, content))
    if len(kinds := {result.content["benchmark"] for result in results}) != 1:
        raise ValueError(f"results must be of one benchmark, got {', '.join(sorted(kinds))}")
    return sorted(results, key=lambda result: result[:2])


def _content(path: Path) -> dict[str, Any]:
    path = report.result_in(path) if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no result {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if {"benchmark", "metrics", "settings", "run"} <= content.keys():
            return content
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path} is no result of `tim evaluate`")


def _label(run: dict[str, Any]) -> str:
    scale = run.get("settings", {}).get("cfg_scale")
    return "samples" if scale is None else f"guidance {scale:g}"


def differences(results: Sequence[Result]) -> list[str]:
    """What the results were not measured alike in, so that they do not compare."""
    every = [result.content["settings"] for result in results]
    names = dict.fromkeys(name for settings in every for name in settings)
    return [
        name for name in names
        if name not in _PLACES and len({json.dumps(each.get(name)) for each in every}) > 1
    ]  # fmt: skip


def published(results: Sequence[Result], metric: str) -> dict[str, dict[int, float]]:
    """The paper's figures of that metric, steps → value, by what they are called."""
    benchmark = results[0].content["benchmark"]
    sides = {_side(result.content["run"] or {}) for result in results}
    return {
        f"TiM{f' {side}²' if side else ''}, {SOURCE}": values
        for (of, name, side), values in PUBLISHED.items()
        if (of, name) == (benchmark, metric) and (side is None or side in sides)
    }


def _side(run: dict[str, Any]) -> int | None:
    return run.get("settings", {}).get("height")


def table(results: Sequence[Result]) -> str:
    """All metrics as a Markdown table, with the published figures below."""
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    rows = [
        [result.label, result.steps, *(result.metrics.get(name, "–") for name in names)]
        for result in results
    ]
    for name in names:
        for title, values in published(results, name).items():
            rows += [
                [title, steps, *(value if other == name else "–" for other in names)]
                for steps, value in values.items()
            ]
    return report.table(["", "steps", *names], rows)


def plot(results: Sequence[Result], path: str | Path, metric: str | None = None) -> None:
    """A panel a metric (all by default) over the steps; published figures are dotted. PNG.

    Raises:
        ValueError: no result has that metric.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    if metric is not None and metric not in names:
        raise ValueError(
            f"the metrics are {', '.join(names)}; got {metric}{closest(metric, names)}"
        )
    shown = names if metric is None else [metric]
    figure = Figure(figsize=(4.5 * len(shown), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        having = [result for result in results if name in result.metrics]
        ticks = {result.steps for result in having}
        for label in dict.fromkeys(result.label for result in having):
            line = {each.steps: each.metrics[name] for each in having if each.label == label}
            axes.plot(line.keys(), line.values(), marker="o", label=label)
        for title, values in published(results, name).items():
            axes.plot(values.keys(), values.values(), color="grey", ls=":", marker=".", label=title)
            ticks |= values.keys()
        axes.set_xscale("log", base=2)
        axes.set(xlabel="sampling steps", ylabel=name.replace("_", " "))
        axes.set_xticks(sorted(ticks), map(str, sorted(ticks)))
        axes.legend(fontsize=8)
    with replacing(path) as new:
        figure.savefig(new, dpi=120, format="png")
