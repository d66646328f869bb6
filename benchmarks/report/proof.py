"""Which of a GPU's measurements may be told.

Only those of a backend whose tests ran to their end on the same GPU with the same sources, where
compute-sanitizer, if it ran, found nothing; and not of an op whose tests failed there. What is told
of cuda rests on the tests of both, as its tangents and attention are Triton's.
"""

import re
from collections.abc import Iterable

from ..record.rows import FUSED, Network, Op, Row, Timed, fill_ratios, read

SANITIZERS = "memcheck, short list", "racecheck, short list"  # the planted error is no finding
FOUND = 99  # compute-sanitizer's exit status where it found something and the program went on
FINDINGS = re.compile(r"SUMMARY: [1-9]")  # "ERROR SUMMARY: 3 errors", also where it stopped
KINDS = {"ops": Op, "model": Network}  # of rows, by the part of the gate that has them
RESTS_ON = {"triton": ("triton",), "cuda": FUSED}


def gpus(results: Iterable[dict]) -> list[str]:
    return sorted({r["machine"]["gpu"] for r in results if r["machine"].get("gpu")})


def latest(results: Iterable[dict], part: str, gpu: str | None = None) -> dict | None:
    own = [r for r in results if _has(r, part) and r["machine"].get("gpu") == gpu]
    return own[-1] if own else None


def _has(result: dict, part: str) -> bool:
    """Of "short", what it came to."""
    if result["part"] != "short":
        return result["part"] == part
    if part == "tests":
        return any(stage.get("tests") for stage in result["stages"])
    return part in KINDS and bool(rows_of(result, KINDS[part]))


def why_not_proved(result: dict, results: Iterable[dict]) -> str | None:
    """Why no speed of ours in a result may be told."""
    reasons = [unproven(backend, result, results) for backend in FUSED]
    return reasons[0] if all(reasons) else None


def unproven(backend: str, result: dict, results: Iterable[dict]) -> str | None:
    """Why a backend's speeds in a result may not be told."""
    proofs = _proofs(result, results)
    if not proofs:
        return "the tests have not run on this GPU with the same sources"
    stages = [stage for proof in proofs for stage in proof["stages"]]
    found = [s["name"] for s in stages if s["name"] in SANITIZERS and _has_found(s)]
    if found:
        return f"compute-sanitizer did not pass: {', '.join(found)}"
    if any(_ran_to_its_end(proof, backend) for proof in proofs):
        return None
    return f"the tests of {backend} did not run to their end"


def _has_found(stage: dict) -> bool:
    """A finding, and not a tool that does not work on this machine."""
    says_so = stage.get("returncode") == FOUND or FINDINGS.search(stage.get("why", ""))
    return stage["outcome"] == "failed" and bool(says_so)


def failed_tests(
    result: dict, results: Iterable[dict], backends: Iterable[str] = FUSED
) -> list[str]:
    """Names of the tests of these backends that failed on the result's GPU and sources, each in
    the last run that came to its end."""
    failed = []
    for backend in backends:
        ended = [p for p in _proofs(result, results) if _ran_to_its_end(p, backend)]
        stage = f"tests, {backend}"
        for failure in ended[-1]["failures"] if ended else ():
            if failure["stage"] == stage != failure["what"]:
                failed.append(failure["what"])
    return failed


def _proofs(result: dict, results: Iterable[dict]) -> list[dict]:
    """All tests on that GPU with these sources, oldest first."""
    gpu, sources = result["machine"]["gpu"], result["sources"]
    own = (r for r in results if r["sources"] == sources and r["machine"].get("gpu") == gpu)
    return [r for r in own if _has(r, "tests")]


def _ran_to_its_end(proof: dict, backend: str) -> bool:
    stages = [stage for stage in proof["stages"] if stage["name"] == f"tests, {backend}"]
    return any(s["outcome"] in ("passed", "failed") and s.get("tests") for s in stages)


def told_rows(result: dict, results: Iterable[dict], kind: type[Timed]) -> list[Timed]:
    """The rows of a kind, ops or networks, in a GPU's result that may be told."""
    rows = rows_of(result, kind)
    fill_ratios(rows)
    hidden = [backend for backend in FUSED if unproven(backend, result, results)]
    failed = {b: failed_tests(result, results, RESTS_ON[b]) for b in FUSED}

    def is_proven(row: Timed, backend: str) -> bool:
        if backend in hidden:
            return False
        if not isinstance(row, Op):
            return not failed[backend]
        names = row.folder, row.op.partition(" ")[0].rstrip(",")
        return not any(name in what for what in failed[backend] for name in names)

    def is_told(row: Timed) -> bool:
        """Others are told beside one of ours."""
        own = row.contender.rpartition(", ")[2]
        return any(is_proven(row, b) for b in ((own,) if own in FUSED else FUSED))

    return [row for row in rows if is_told(row)]


def rows_of(result: dict, kind: type[Row]) -> list:
    return [read(entry) for entry in result["rows"] if entry["kind"] == kind.kind]
