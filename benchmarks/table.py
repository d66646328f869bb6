"""The gate's result as a screenful for a terminal."""

from collections import Counter

from .results import FUSED, ratios

MOST_LINES = 25


def of_result(result: dict) -> str:
    """A screenful: the machine, what went wrong, and the ratios that matter."""
    machine, limits = result["machine"], result["limits"]
    lines = [f"{result['part']}: {machine.get('gpu') or machine.get('cpu') or 'unknown machine'}"]
    if result["dry_run"]:
        lines.append("A DRY RUN on a CPU, with Triton's interpreter: these numbers mean nothing.")
    lines.append(
        f"torch {machine.get('torch')}, triton {machine.get('triton')}, CUDA {machine.get('cuda')},"
        f" driver {machine.get('driver')}, commit {result['commit'][:12]}"
    )
    if limits:
        lines.append(
            f"measured limits: {limits['copy_gb_per_s']:.0f} GB/s,"
            f" {limits['gemm_tflop_per_s']:.0f} TFLOP/s"
        )
    for stage in result["stages"]:
        tests = ", ".join(f"{count} {what}" for what, count in stage.get("tests", {}).items())
        why = stage.get("why", "") if stage["outcome"] == "left out" else tests
        lines.append(
            f"  {stage['outcome']:<10}{stage['seconds']:>7.1f} s  {stage['name']:<28}{why}"
        )
    lines += _op_lines(result["rows"]) + _model_lines(result["rows"])
    left_out = Counter(entry["why"] for entry in result["left_out"])
    for why, count in left_out.most_common(8):
        lines.append(f"left out, {count}: {why[:120]}")
    for failure in result["failures"][:MOST_LINES]:
        why = " ".join(failure["why"].split())[-160:]
        lines.append(f"FAILED {failure['stage']}: {failure['what'][:90]}: {why}")
    if len(result["failures"]) > MOST_LINES:
        lines.append(f"… and {len(result['failures']) - MOST_LINES} failures more")
    return "\n".join(lines)


def _number(value: float | None, spec: str) -> str:
    width = spec.split(".")[0]
    return f"{'':>{width}}" if value is None else f"{value:>{spec}}"


def _op_lines(rows: list[dict]) -> list[str]:
    rows = [row for row in rows if row["kind"] == "op" and row["contender"] in FUSED]
    if not rows:
        return []
    lines = [
        f"{'op':<44}{'direction':<12}{'shape':<22}{'by':<8}{'µs':>9}{'GB/s':>7}{'of limit':>9}"
        f"{'eager':>8}{'compile':>8}"
    ]
    for row in rows[: 4 * MOST_LINES]:
        lines.append(
            f"{row['op'][:43]:<44}{row['direction']:<12}{row['shape'][:21]:<22}{row['contender']:<8}"
            f"{1e3 * row['ms']:>9.1f}{row['gb_per_s']:>7.0f}{100 * row['share_of_limit']:>8.0f}%"
            f"{ratios(row)}"
        )
    return lines


def _model_lines(rows: list[dict]) -> list[str]:
    rows = [row for row in rows if row["kind"] == "model"]
    if not rows:
        return []
    lines = [
        f"{'model':<12}{'batch':>6}  {'task':<26}{'by':<28}{'ms':>10}{'images/s':>10}{'GiB':>7}"
        f"{'J/image':>9}{'eager':>8}{'compile':>8}"
    ]
    for row in rows:
        lines.append(
            f"{row['model']:<12}{row['batch']:>6}  {row['task']:<26}{row['contender']:<28}"
            f"{row['ms']:>10.2f}{row['samples_per_s']:>10.1f}{_number(row['peak_gib'], '7.1f')}"
            f"{_number(row['joules_per_image'], '9.2f')}{ratios(row)}"
        )
    return lines
