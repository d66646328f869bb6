"""The committed results as Markdown and plots; the README's performance section.

    python -m benchmarks.report            # print the section
    python -m benchmarks.report --write    # put it into README.md, and plots into docs/benchmarks

Only files in benchmarks/results speak. The speeds of a GPU are told only where the tests ran on
the same GPU with the same sources, and not for an op whose tests failed there.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from .results import COMPILE, EAGER, FUSED, fill_ratios, load

ROOT = Path(__file__).parents[1]
README, PLOTS = ROOT / "README.md", ROOT / "docs/benchmarks"
BEGIN, END = "<!-- benchmarks: begin, made by `make bench` -->", "<!-- benchmarks: end -->"
NOTHING = (
    "Nothing has been measured on a GPU yet, so no speed of a kernel is stated here. `make gpu` "
    "measures it, in three parts of less than nine minutes, into one file each."
)
TABLE_SHAPES = ("c2i-xl, batch 64", "t2i-xl, batch 8")


def section(results: Sequence[dict]) -> str:
    """Everything between the README's markers."""
    parts = [NOTHING] if not gpus(results) else []
    for gpu in gpus(results):
        parts += _gpu_section(gpu, results)
    parts += _savings_section(results)
    return "\n\n".join(parts)


def gpus(results: Iterable[dict]) -> list[str]:
    return sorted({r["machine"]["gpu"] for r in results if r["machine"].get("gpu")})


def latest(results: Iterable[dict], part: str, gpu: str | None = None) -> dict | None:
    own = [r for r in results if r["part"] == part and r["machine"].get("gpu") == gpu]
    return own[-1] if own else None


def obstacle(result: dict, results: Iterable[dict]) -> str | None:
    """Why the speeds of a result may not be told."""
    proofs = [
        r
        for r in results
        if r["part"] == "tests"
        and r["machine"].get("gpu") == result["machine"]["gpu"]
        and r["sources"] == result["sources"]
    ]
    if not proofs:
        return "the tests have not run on this GPU with the same sources"
    ran = [s for s in proofs[-1]["stages"] if s["name"].startswith("tests, ") and s.get("tests")]
    return None if ran else "the tests did not run to an end"


def failed_tests(result: dict, results: Iterable[dict]) -> list[str]:
    """Names of tests that failed on the result's GPU and sources."""
    return [
        failure["what"]
        for r in results
        if r["part"] == "tests"
        and r["machine"].get("gpu") == result["machine"]["gpu"]
        and r["sources"] == result["sources"]
        for failure in r["failures"]
        if failure["stage"].startswith("tests, ")
    ]


def told_rows(result: dict, results: Iterable[dict]) -> list[dict]:
    """The rows of a GPU's result that may be told."""
    failed = failed_tests(result, results)
    rows = [row for row in result["rows"] if row["kind"] in ("op", "model")]
    fill_ratios(rows)
    if not failed:
        return rows
    return [
        row
        for row in rows
        if row["kind"] == "op" and not any(f"test_{folder(row['op'])}" in what for what in failed)
    ]


def folder(op: str) -> str:
    """The folder of tim_kernels whose tests prove it."""
    name = op.partition(" ")[0].rstrip(",")
    return "ada_layer_norm" if name.startswith("gated_residual") else name


def _gpu_section(gpu: str, results: Sequence[dict]) -> list[str]:
    parts = [f"### {gpu}"]
    for part in ("ops", "model"):
        result = latest(results, part, gpu)
        if result is None:
            parts.append(f"{part}: not measured yet.")
            continue
        if reason := obstacle(result, results):
            parts.append(f"{part}: measured, but not told, since {reason}.")
            continue
        rows = told_rows(result, results)
        parts.append(_where(result))
        parts.append(_op_table(rows) if part == "ops" else _model_table(rows))
        for path in plots_of(result):
            parts.append(f"![{path.stem}]({path.relative_to(ROOT)})")
        if failed := failed_tests(result, results):
            parts.append(f"Tests failed there, {len(failed)}; what they prove is not shown.")
    return parts


def _where(result: dict) -> str:
    machine, limits = result["machine"], result["limits"]
    return (
        f"[{result['file']}](benchmarks/results/{result['file']}), commit "
        f"{result['commit'][:12]}: driver {machine['driver']}, torch {machine['torch']}, triton "
        f"{machine['triton']}, CUDA {machine['cuda']}. Limits measured in that run: a copy "
        f"{limits['copy_gb_per_s']:,.0f} GB/s, a GEMM {limits['gemm_tflop_per_s']:,.0f} TFLOP/s."
    )


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
    head = ("model", "task", "by", "batch", "ms", "images/s", "GiB", "J/image", "eager", COMPILE)
    lines = (
        (
            r["model"], r["task"], r["contender"], str(r["batch"]), f"{r['ms']:,.2f}",
            f"{r['samples_per_s']:,.1f}", "" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}",
            "" if r["joules_per_image"] is None else f"{r['joules_per_image']:.2f}",
            _ratio(r["vs_eager"]), _ratio(r["vs_compile"]),
        )
        for r in own
    )  # fmt: skip
    return markdown(head, lines, 3)


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


def plots_of(result: dict) -> list[Path]:
    """Where the plots of a GPU's result lie once `write_plots` has made them."""
    stem = Path(result["file"]).stem
    names = ("against", "limit") if result["part"] == "ops" else ("models",)
    return [PLOTS / f"{stem}-{name}.png" for name in names]


def write_plots(result: dict, results: Sequence[dict]) -> None:
    """Bar charts: ops against eager and compile, their share of the limit; models."""
    rows = told_rows(result, results)
    PLOTS.mkdir(parents=True, exist_ok=True)
    paths = plots_of(result)
    if result["part"] == "ops":
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
        for part in ("ops", "model"):
            result = latest(results, part, gpu)
            if result is not None and obstacle(result, results) is None:
                write_plots(result, results)
    README.write_text(into(README.read_text(), text))


if __name__ == "__main__":
    main()
