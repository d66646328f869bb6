"""A loss log of JSON lines."""

import json
from pathlib import Path


class LossLog:
    """Appends records to a file; opened at `step`, it first drops the lines past that step."""

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [line for line in read_log(path) if line["step"] <= step] if path.is_file() else []
        rewritten = path.with_suffix(".partial")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept))
        rewritten.replace(path)

    def append(self, record: dict[str, float]) -> None:
        """Write one line, in the file when this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict[str, float]]:
    """The records of a log; a last line cut short by an interrupted write is left out."""
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]
