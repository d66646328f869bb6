"""Which of a GPU's measurements may be told.

Only those of a backend whose tests ran to their end on the same GPU with the same sources, where
compute-sanitizer, if it ran, found nothing; and not of an op whose tests failed there.
"""

from collections.abc import Iterable

from .results import FUSED, fill_ratios

SANITIZERS = "memcheck, ", "racecheck, "
IN_SHORT = "tests", "ops", "model"  # of what the gate's part "short" has some


def gpus(results: Iterable[dict]) -> list[str]:
    return sorted({r["machine"]["gpu"] for r in results if r["machine"].get("gpu")})


def latest(results: Iterable[dict], part: str, gpu: str | None = None) -> dict | None:
    own = [r for r in results if _has(r, part) and r["machine"].get("gpu") == gpu]
    return own[-1] if own else None


def _has(result: dict, part: str) -> bool:
    return result["part"] == part or (result["part"] == "short" and part in IN_SHORT)


def obstacle(result: dict, results: Iterable[dict]) -> str | None:
    """Why no speed of ours in a result may be told."""
    reasons = [unproven(backend, result, results) for backend in FUSED]
    return reasons[0] if all(reasons) else None


def unproven(backend: str, result: dict, results: Iterable[dict]) -> str | None:
    """Why a backend's speeds in a result may not be told."""
    proof = _proof(result, results)
    if proof is None:
        return "the tests have not run on this GPU with the same sources"
    stages = {stage["name"]: stage for stage in proof["stages"]}
    found = [n for n, s in stages.items() if n.startswith(SANITIZERS) and s["outcome"] == "failed"]
    if found:
        return f"compute-sanitizer did not pass: {', '.join(found)}"
    stage = stages.get(f"tests, {backend}", {})
    has_ended = stage.get("outcome") in ("passed", "failed") and stage.get("tests")
    return None if has_ended else f"the tests of {backend} did not run to their end"


def failed_tests(result: dict, results: Iterable[dict]) -> list[str]:
    """Names of tests that failed on the result's GPU and sources."""
    proof = _proof(result, results) or {"failures": []}
    return [
        failure["what"]
        for failure in proof["failures"]
        if failure["stage"].startswith("tests, ") and failure["what"] != failure["stage"]
    ]


def _proof(result: dict, results: Iterable[dict]) -> dict | None:
    """The last tests on that GPU with these sources."""
    gpu, sources = result["machine"]["gpu"], result["sources"]
    return latest([r for r in results if r["sources"] == sources], "tests", gpu)


def told_rows(result: dict, results: Iterable[dict], kind: str) -> list[dict]:
    """The rows of a kind, "op" or "model", in a GPU's result that may be told."""
    rows = [row for row in result["rows"] if row["kind"] == kind]
    fill_ratios(rows)
    hidden = [backend for backend in FUSED if unproven(backend, result, results)]
    failed = failed_tests(result, results)

    def is_told(row: dict) -> bool:
        if row["contender"].rpartition(", ")[2] in hidden:
            return False
        if kind == "model":
            return not failed
        names = folder(row["op"]), row["op"].partition(" ")[0].rstrip(",")
        return not any(name in what for what in failed for name in names)

    return [row for row in rows if is_told(row)]


def folder(op: str) -> str:
    """The folder of tim_kernels whose tests prove it."""
    name = op.partition(" ")[0].rstrip(",")
    return "ada_layer_norm" if name.startswith("gated_residual") else name
