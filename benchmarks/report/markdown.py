"""The committed results as Markdown and plots; the README's performance section.

    python -m benchmarks report            # print the section
    python -m benchmarks report --write    # put it into README.md, and plots into docs/benchmarks

Only files in benchmarks/results speak, and of a GPU's only what proof.py lets pass.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..record.provenance import ROOT
from ..record.rows import EAGER, FP8, FUSED, Derivative, Fp8Error, Op, Timed, Turns, load
from ..record.table import markdown
from .proof import KINDS, failed_tests, gpus, latest, rows_of, told_rows, unproven, why_not_proved

README, PLOTS = ROOT / "README.md", ROOT / "docs/benchmarks"
BEGIN, END = "<!-- benchmarks: begin, made by `make bench` -->", "<!-- benchmarks: end -->"
NOTHING = (
    "Nothing has been measured on a GPU yet, so no speed of a kernel is stated here; `make gpu` "
    "measures it."
)
TABLE_SHAPES = ("c2i-xl, batch 64", "t2i-xl, batch 8")


def section(results: Sequence[dict]) -> str:
    """Everything between the README's markers."""
    parts = [NOTHING] if not gpus(results) else []
    for gpu in gpus(results):
        parts += _gpu_section(gpu, results)
    parts += _cpu_section(results)
    return "\n\n".join(parts)


def _gpu_section(gpu: str, results: Sequence[dict]) -> list[str]:
    parts = [f"### {gpu}"]
    for part, kind in KINDS.items():
        result = latest(results, part, gpu)
        if result is None:
            parts.append(f"{part}: not measured yet.")
            continue
        if reason := why_not_proved(result, results):
            parts.append(f"{part}: measured, but not told, since {reason}.")
            continue
        rows = told_rows(result, results, kind)
        parts.append(_where(result))
        parts.append(_table(rows, kind))
        if part == "ops":
            parts += _other_tables(result, results)
        for path in plots_of(result, kind):
            parts.append(f"![{path.stem}]({path.relative_to(ROOT)})")
        for name in FUSED:
            if reason := unproven(name, result, results):
                parts.append(f"What {name} reached is not shown, since {reason}.")
        if failed := failed_tests(result, results):
            parts.append(f"Tests failed there, {len(failed)}; what they prove is not shown.")
    return parts


def _table(rows: Sequence[Timed], kind: type[Timed]) -> str:
    if kind is Op:
        own = [r for r in rows if r.contender in (*FUSED, FP8) and r.shape in TABLE_SHAPES]
    else:
        own = [r for r in rows if r.contender != EAGER]
    return markdown(own, kind.columns)


def _cpu_section(results: Sequence[dict]) -> list[str]:
    """Whole networks against PyTorch's own on a CPU."""
    result = latest(results, "cpu")
    if result is None:
        return []
    machine = result["machine"]
    return [
        f"Whole networks on a CPU ({machine['cpu']}, threads: {machine['threads']}; "
        f"[{result['file']}](benchmarks/results/{result['file']})), timed by turns with the "
        "published form in eager PyTorch and with torch.compile of it; above 1 is a gain.",
        markdown([r for r in rows_of(result, Turns) if r.subject == "model"], Turns.columns),
    ]


def _where(result: dict) -> str:
    machine, limits = result["machine"], result["limits"]
    text = (
        f"[{result['file']}](benchmarks/results/{result['file']}), commit "
        f"{result['commit'][:12]}: driver {machine['driver']}, torch {machine['torch']}, triton "
        f"{machine['triton']}, CUDA {machine['cuda']}."
    )
    if limits:
        text += (
            f" Limits measured in that run: a copy {limits['copy_gb_per_s']:,.0f} GB/s, a GEMM "
            f"{limits['gemm_tflop_per_s']:,.0f} TFLOP/s."
        )
    return text if result.get("finished", True) else f"{text} The run was cut off."


def _other_tables(result: dict, results: Sequence[dict]) -> list[str]:
    """dF/dt of a network and the tangent of attention, by error, time and memory; errors of FP8."""
    if unproven("triton", result, results):
        return []
    rows = rows_of(result, Derivative)
    tables = [([row for row in rows if row.what == what], columns)
              for what, columns in Derivative.columns.items()]  # fmt: skip
    tables.append((rows_of(result, Fp8Error), Fp8Error.columns))
    return [markdown(own, columns) for own, columns in tables if own]


def plots_of(result: dict, kind: type[Timed]) -> list[Path]:
    """Where the plots of a GPU's rows of a kind lie once `write_plots` has made them."""
    stem = Path(result["file"]).stem
    names = ("against", "limit") if kind is Op else ("models",)
    return [PLOTS / f"{stem}-{name}.png" for name in names]


def write_plots(result: dict, results: Sequence[dict], kind: type[Timed]) -> None:
    """Bar charts: ops against eager and compile, their share of the limit; models."""
    rows = told_rows(result, results, kind)
    PLOTS.mkdir(parents=True, exist_ok=True)
    title, paths = result["machine"]["gpu"], plots_of(result, kind)
    if kind is Op:
        rows = [(f"{r.op}, {r.direction}", r) for r in rows if r.shape == TABLE_SHAPES[0]]
        title = f"{title}, {TABLE_SHAPES[0]}"
        _bars(paths[1], rows, "share_of_limit", f"{title}: share of the measured limit")
    else:
        rows = [(f"{r.model} {r.batch}, {r.task}", r) for r in rows]
    _bars(paths[0], rows, "vs_eager", f"{title}: times eager's speed")


def _bars(path: Path, rows: list[tuple[str, Timed]], value: str, title: str) -> None:
    """A group of bars for each label, a bar for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(label for label, _ in rows))
    contenders = list(dict.fromkeys(row.contender for _, row in rows))
    values = {(label, row.contender): getattr(row, value) or 0.0 for label, row in rows}
    height = 0.8 / max(len(contenders), 1)
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.45 * len(labels)), layout="constrained")
    for i, contender in enumerate(contenders):
        places = [place + height * i for place in range(len(labels))]
        axes.barh(
            places, [values.get((name, contender), 0.0) for name in labels], height, label=contender
        )
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def into(readme: str, text: str) -> str:
    """The README with the section between its markers replaced.

    Raises:
        ValueError: the markers are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into README.md and docs/benchmarks")
    args = parser.parse_args(argv)
    results = load()
    text = section(results)
    if not args.write:
        print(text)
        return
    for gpu in gpus(results):
        for part, kind in KINDS.items():
            result = latest(results, part, gpu)
            if result is not None and why_not_proved(result, results) is None:
                write_plots(result, results, kind)
    README.write_text(into(README.read_text(), text))
