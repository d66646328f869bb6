"""The gate's result as a screenful for a terminal."""

from collections import Counter

from ..record import rows, table

MOST_LINES = 25


def of_result(result: dict) -> str:
    """The machine, what went wrong, and the ratios that matter."""
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
    measured = [rows.read(entry) for entry in result["rows"]]
    told = *rows.FUSED, rows.FP8
    ops = [row for row in measured if isinstance(row, rows.Op) and row.contender in told]
    networks = [row for row in measured if isinstance(row, rows.Network)]
    errors = [row for row in measured if isinstance(row, rows.Fp8Error)]
    for own in (ops[: 4 * MOST_LINES], networks, errors):
        lines += [table.text(own, own[0].columns)] if own else []
    left_out = Counter(entry["why"] for entry in result["left_out"])
    for why, count in left_out.most_common(8):
        lines.append(f"left out, {count}: {why[:120]}")
    for failure in result["failures"][:MOST_LINES]:
        why = " ".join(failure["why"].split())[-160:]
        lines.append(f"FAILED {failure['stage']}: {failure['what'][:90]}: {why}")
    if len(result["failures"]) > MOST_LINES:
        lines.append(f"… and {len(result['failures']) - MOST_LINES} failures more")
    return "\n".join(lines)
