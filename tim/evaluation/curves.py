"""Networks measured at several numbers of steps and guidance scales: shares, a table, a plot."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tim.evaluation import report
from tim.files import replacing

STEPS = (1, 2, 4, 8, 32)
# network → guidance → at each of STEPS a value and its standard error
Curves = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]


class Panel(NamedTuple):
    """One measurement; `reference` is a horizontal line, its label and height."""

    ylabel: str
    curves: Curves
    reference: tuple[str, float] | None = None
    yscale: str = "linear"


def share(right: Tensor) -> tuple[float, float]:
    """Of trues among (N,), and its standard error."""
    value = right.double().mean().item()
    return value, math.sqrt(value * (1 - value) / len(right))


def percent(value: float, error: float) -> str:
    """Of a share: `92.5 ± 0.8 %`."""
    return f"{100 * value:.1f} ± {100 * error:.1f} %"


def markdown(columns: Mapping[str, Sequence[str]]) -> str:
    """A table of one line for each of STEPS; `columns` by their head."""
    rows = [[steps, *of] for steps, *of in zip(STEPS, *columns.values(), strict=True)]
    return report.table(["steps", *columns], rows, has_names=False)


def plot(panels: Sequence[Panel], path: Path) -> None:
    """Each panel over the number of steps, as a PNG; a colour is a network, a style a guidance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for colour, (name, by_guidance) in enumerate(panel.curves.items()):
            styles = zip(("-", "--", ":"), by_guidance.items(), strict=False)
            for style, (guidance, measured) in styles:
                look = dict(color=f"C{colour}", ls=style, marker="o", capsize=3)
                label = f"{name}, guidance {guidance}"
                axes.errorbar(STEPS, *zip(*measured, strict=True), **look, label=label)
        if panel.reference is not None:
            label, height = panel.reference
            axes.axhline(height, color="grey", ls=":", label=label)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="sampling steps", xticks=STEPS, xticklabels=STEPS)
        axes.set(ylabel=panel.ylabel, yscale=panel.yscale)
        axes.legend(fontsize=8)
    with replacing(path) as new:
        figure.savefig(new, dpi=120)
