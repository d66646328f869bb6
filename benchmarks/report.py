"""The committed results as Markdown and plots; the README's performance section.

    python -m benchmarks.report            # print the section
    python -m benchmarks.report --write    # put it into README.md, and plots into docs/benchmarks

Only files in benchmarks/results speak, and of a GPU's only what proof.py lets pass.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from .proof import KINDS, failed_tests, gpus, latest, obstacle, told_rows, unproven
from .results import COMPILE, EAGER, FUSED, load

ROOT = Path(__file__).parents[1]
README, PLOTS = ROOT / "README.md", ROOT / "docs/benchmarks"
BEGIN, END = "<!-- benchmarks: begin, made by `make bench` -->", "<!-- benchmarks: end -->"
NOTHING = (
    "Nothing has been measured on a GPU yet, so no speed of a kernel is stated here. `make gpu` "
    "measures it, in three parts of less than nine minutes, into one file each; `make gpu "
    "PART=short` has the most telling of all three in one."
)
TABLE_SHAPES = ("c2i-xl, batch 64", "t2i-xl, batch 8")


def section(results: Sequence[dict]) -> str:
    """Everything between the README's markers."""
    parts = [NOTHING] if not gpus(results) else []
    for gpu in gpus(results):
        parts += _gpu_section(gpu, results)
    parts += _savings_section(results)
    return "\n\n".join(parts)


def _gpu_section(gpu: str, results: Sequence[dict]) -> list[str]:
    parts = [f"### {gpu}"]
    for part, kind in KINDS.items():
        result = latest(results, part, gpu)
        if result is None:
            parts.append(f"{part}: not measured yet.")
            continue
        if reason := obstacle(result, results):
            parts.append(f"{part}: measured, but not told, since {reason}.")
            continue
        rows = told_rows(result, results, kind)
        parts.append(_where(result))
        parts.append(_op_table(rows) if kind == "op" else _model_table(rows))
        if part == "ops":
            parts += _derivative_tables(result, results)
        for path in plots_of(result, kind):
            parts.append(f"![{path.stem}]({path.relative_to(ROOT)})")
        for name in FUSED:
            if reason := unproven(name, result, results):
                parts.append(f"What {name} reached is not shown, since {reason}.")
        if failed := failed_tests(result, results):
            parts.append(f"Tests failed there, {len(failed)}; what they prove is not shown.")
    return parts


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


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int) -> str:
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} ×"


def _op_table(rows: list[dict]) -> str:
    own = [r for r in rows if r["contender"] in FUSED and r["shape"] in TABLE_SHAPES]
    head = ("op", "direction", "shape", "by", "µs", "GB/s", "of the limit", "eager", COMPILE)
    lines = (
        (
            r["op"], r["direction"], r["shape"], r["contender"], f"{1e3 * r['ms']:,.1f}",
            f"{r['gb_per_s']:,.0f}", f"{100 * r['share_of_limit']:.0f} %", _ratio(r["vs_eager"]),
            _ratio(r["vs_compile"]),
        )
        for r in own
    )  # fmt: skip
    return markdown(head, lines, 4)


def _model_table(rows: list[dict]) -> str:
    own = [r for r in rows if r["contender"] != EAGER]
    head = (
        "model", "task", "by", "batch", "ms", "images/s", "of the limit", "GiB", "J/image", "eager",
        COMPILE,
    )  # fmt: skip
    lines = (
        (
            r["model"], r["task"], r["contender"], str(r["batch"]), f"{r['ms']:,.2f}",
            f"{r['samples_per_s']:,.1f}", f"{100 * r['share_of_limit']:.0f} %",
            "" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}",
            "" if r["joules_per_image"] is None else f"{r['joules_per_image']:.2f}",
            _ratio(r["vs_eager"]), _ratio(r["vs_compile"]),
        )
        for r in own
    )  # fmt: skip
    return markdown(head, lines, 3)


def _derivative_tables(result: dict, results: Sequence[dict]) -> list[str]:
    """dF/dt of a network and the tangent of attention, by error, time and memory."""
    rows = [row for row in result["rows"] if row["kind"] == "derivative"]
    if unproven("triton", result, results):
        rows = []

    def cells(row: dict, *words: str) -> tuple[str, ...]:
        error = f"{row['error']:.1e}" if "error" in row else ""
        return *words, error, f"{row['ms']:,.2f}", f"{row['peak_bytes'] / 2**20:,.0f}"

    network = [
        cells(r, *(str(r[k]) for k in ("network", "depth", "derivative", "dtype", "contender")))
        for r in rows
        if r["what"] == "dF/dt"
    ]
    attention = [cells(r, r["shape"], r["contender"]) for r in rows if r["what"] == "attention"]
    cost = ("error", "ms", "MiB")
    return [
        markdown(head, lines, len(head) - len(cost))
        for head, lines in (
            (("dF/dt of", "blocks", "by", "dtype", "contender", *cost), network),
            (("tangent of attention, bfloat16", "contender", *cost), attention),
        )
        if lines
    ]


def _savings_section(results: Sequence[dict]) -> list[str]:
    result = latest(results, "savings")
    if result is None:
        return []
    machine = result["machine"]
    head = ("on a CPU, float32", "model", "batch", "as published, ms", "here, ms", "ratio")
    lines = (
        (
            r["what"], r["model"], str(r["batch"]), f"{r['as_published_ms']:.1f}",
            f"{r['here_ms']:.1f}", f"{r['ratio']:.2f} ({r['ratio_10']:.2f}–{r['ratio_90']:.2f})",
        )
        for r in result["rows"]
    )  # fmt: skip
    return [
        "What the algorithm alone saves, without any kernel: the same network put together in "
        f"fewer, larger operations, on a CPU ({machine['cpu']}, threads: {machine['threads']}; "
        f"[{result['file']}](benchmarks/results/{result['file']})). The ratio is the median over "
        "rounds by turns, with its 10th and 90th percentile; above 1 is a gain.",
        markdown(head, lines, 2),
    ]


def plots_of(result: dict, kind: str) -> list[Path]:
    """Where the plots of a GPU's rows of a kind lie once `write_plots` has made them."""
    stem = Path(result["file"]).stem
    names = ("against", "limit") if kind == "op" else ("models",)
    return [PLOTS / f"{stem}-{name}.png" for name in names]


def write_plots(result: dict, results: Sequence[dict], kind: str) -> None:
    """Bar charts: ops against eager and compile, their share of the limit; models."""
    rows = told_rows(result, results, kind)
    PLOTS.mkdir(parents=True, exist_ok=True)
    paths = plots_of(result, kind)
    if kind == "op":
        rows = [r for r in rows if r["shape"] == TABLE_SHAPES[0]]

        def label(row):
            return f"{row['op']}, {row['direction']}"

        title = f"{result['machine']['gpu']}, {TABLE_SHAPES[0]}"
        _bars(paths[0], rows, label, "vs_eager", f"{title}: times eager's speed")
        _bars(paths[1], rows, label, "share_of_limit", f"{title}: share of the measured limit")
    else:

        def label(row):
            return f"{row['model']} {row['batch']}, {row['task']}"

        _bars(paths[0], rows, label, "vs_eager", f"{result['machine']['gpu']}: times eager's speed")


def _bars(path: Path, rows: list[dict], label, value: str, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(map(label, rows)))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    values = {(label(row), row["contender"]): row[value] or 0.0 for row in rows}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into README.md and docs/benchmarks")
    args = parser.parse_args()
    results = load()
    text = section(results)
    if not args.write:
        print(text)
        return
    for gpu in gpus(results):
        for part, kind in KINDS.items():
            result = latest(results, part, gpu)
            if result is not None and obstacle(result, results) is None:
                write_plots(result, results, kind)
    README.write_text(into(README.read_text(), text))


if __name__ == "__main__":
    main()
