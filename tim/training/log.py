"""A loss log of JSON lines."""

import json
import logging
from pathlib import Path
from typing import Any

from tim.files import replacing

_log = logging.getLogger(__name__)


class LossLog:
    """Appends records to a file; opened at `step`, it first drops the lines past that step."""

    def __init__(self, path: Path, step: int):
        self.path = path
        records = read_log(path) if path.exists() else []
        with replacing(path) as new:
            lines = (json.dumps(record) + "\n" for record in records if record["step"] <= step)
            new.write_text("".join(lines))

    def append(self, record: dict[str, float]) -> None:
        """Write one line, in the file when this returns.

        Raises:
            OSError: the file cannot be written, as on a full disk.
        """
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error}") from error


def read_log(path: Path) -> list[dict[str, float]]:
    """The records of a log by rising step; of several of one step, the last in the file.

    Lines that are no record, as a power cut, a full disk or a merge leaves them, are left out, and
    a warning names them.
    """
    records, damaged = {}, []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if (record := _record(line.strip(b"\0"))) is not None:
            records[record["step"]] = record
        elif line.strip():
            damaged.append(str(number))
    if damaged:
        _log.warning("%s: left out what is no record, line %s", path, ", ".join(damaged))
    return [records[step] for step in sorted(records)]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and type(record.get("step")) is int
    return record if is_record else None
