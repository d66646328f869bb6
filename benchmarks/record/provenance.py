"""Where a result comes from: the code and the time, so that it can be told from another."""

import hashlib
import json
import os
import subprocess
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).parents[2]


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit_hash() -> str:
    """Of the checkout, with "+" if files differ from it; "unknown" without git."""

    def git(*command: str) -> str:
        command = "git", "-C", str(ROOT), *command
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + "+" * bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def source_hash() -> str:
    """Of everything that is measured: tells whether two results are of the same code."""
    digest = hashlib.sha256()
    patterns = "tim_kernels/**/*.py", "tim_kernels/launch/tuning.json", "tim/**/*.py", "csrc/*"
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def save(data: dict, path: Path) -> None:
    """By replacing the file, so that there is never half a one."""
    scratch = path.with_suffix(".json.part")
    with scratch.open("w") as file:
        json.dump(data, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
