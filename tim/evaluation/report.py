"""What an evaluation leaves: a JSON file, a table, and sheets of pictures."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from tim.files import replacing
from tim.provenance import versions

_LABEL = 14  # px, the height of a label's line


def write(
    path: str | Path | None,
    benchmark: str,
    metrics: Mapping[str, float],
    *,
    settings: Mapping[str, Any],
    counts: Mapping[str, int],
    breakdown: Mapping[str, Mapping[str, float]] | None = None,
    run: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a result as JSON, whole or not at all, and return it.

    Args:
        path: None writes nothing.
        benchmark: "imagenet", "mjhq", "geneval" or "dpg".
        metrics: the numbers by name.
        settings: all that changes them: networks, preprocessing, options.
        counts: what they were measured on, and what was left out.
        breakdown: numbers by category, such as {"fid": {"animals": …}}.
        run: `run.json` of the folder of pictures, where `tim generate` made it.

    Raises:
        ValueError: a number is not finite.
    """
    numbers = dict(metrics)
    for name, values in (breakdown or {}).items():
        numbers |= {f"{name} of {part}": value for part, value in values.items()}
    wrong = [f"{name} = {value}" for name, value in numbers.items() if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"not finite: {', '.join(wrong)}")
    result = {
        "benchmark": benchmark,
        "metrics": dict(metrics),
        "breakdown": {name: dict(values) for name, values in (breakdown or {}).items()},
        "counts": dict(counts),
        "settings": dict(settings),
        "versions": versions(),
        "run": dict(run) if run is not None else None,
    }
    if path is not None:
        text = json.dumps(result, indent=2, ensure_ascii=False)
        with replacing(path) as new:
            new.write_text(text + "\n", encoding="utf-8")
    return result


def result_in(folder: str | Path | None) -> Path | None:
    """Where `tim evaluate` writes a result in its folder."""
    return None if folder is None else Path(folder) / "result.json"


def apart(output: str | Path | None, pictures: str | Path) -> None:
    """Raises:
    ValueError: `output` lies among the pictures, where a rerun would take its sheets for some.
    """
    if output is None:
        return
    folder, output = Path(pictures).resolve(), Path(output).resolve()
    if folder in (output, *output.parents):
        raise ValueError(f"{output} must lie outside the pictures' folder {pictures}")


def run_of(folder: str | Path) -> dict[str, Any] | None:
    """`run.json` beside the pictures, None where `tim generate` did not make them.

    Raises:
        ValueError: it is no JSON object.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(run, dict):
        raise ValueError(f"{path} must be a JSON object, as tim generate writes it")
    return run


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, has_names: bool = True) -> str:
    """A Markdown table; numbers are on the right, and text the first column, if it `has_names`."""
    lines = [head, [":---" if has_names else "---:", *["---:"] * (len(head) - 1)], *rows]
    cells = [[_cell(value) for value in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def sheets(
    output: str | Path, chosen: Mapping[str, Mapping[str, str]],
    read: Callable[[Sequence[str]], Sequence[Image.Image]],
) -> None:  # fmt: skip
    """`grid.png`, `worst.png` and `best.png` in a result's folder; an earlier run's go.

    Args:
        chosen: which of the three there are, each {name of a picture: its label}.
        read: names → pictures.
    """
    for title in ("grid", "worst", "best"):
        path, labels = Path(output) / f"{title}.png", chosen.get(title)
        if labels:
            sheet(read([*labels]), [*labels.values()], path)
        else:
            path.unlink(missing_ok=True)


def sheet(
    pictures: Sequence[Image.Image], labels: Sequence[str], path: str | Path,
    *, columns: int = 8, side: int = 256,
) -> None:  # fmt: skip
    """A grid of pictures, each fitted into `side` px and with its label below, as a PNG.

    Raises:
        ValueError: there is no picture, or not a label each.
    """
    if not pictures or len(pictures) != len(labels):
        raise ValueError(f"{len(pictures)} pictures and {len(labels)} labels: one each is needed")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    cell_w, cell_h = side + 8, side + _LABEL + 12
    canvas = Image.new("RGB", (columns * cell_w, rows * cell_h), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=_LABEL)
    for place, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        row, column = divmod(place, columns)
        x, y = column * cell_w + 4, row * cell_h + 4
        is_small = max(picture.size) < side
        method = Image.Resampling.NEAREST if is_small else Image.Resampling.LANCZOS
        canvas.paste(ImageOps.contain(picture.convert("RGB"), (side, side), method), (x, y))
        draw.text((x, y + side + 2), _fitting(label, font, side), fill="black", font=font)
    with replacing(path) as new:
        canvas.save(new, format="PNG")


def _fitting(label: str, font: Any, width: int) -> str:
    text = " ".join(label.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
