"""The questions of DPG-Bench."""

import contextlib
import csv
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from tim.data.prompts import PAGE

_log = logging.getLogger(__name__)
_COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")


class Question(NamedTuple):
    number: int  # its proposition's, within the item
    parents: tuple[int, ...]  # numbers of those that must be answered yes for it to count
    category: str  # such as "attribute - color"
    text: str

    @property
    def broad_category(self) -> str:
        """Such as "attribute"."""
        return self.category.partition("-")[0].strip()


def read(path: str | Path) -> dict[str, list[Question]]:
    """The questions of each item of `dpg_bench.csv`, in its order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: columns are missing, a line is not of the form or a parent is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} of DPG-Bench's questions: see {PAGE}")
    items: dict[str, dict[int, Question]] = {}
    with _utf8(path) as file:
        lines = csv.DictReader(file)
        missing = [name for name in _COLUMNS if name not in (lines.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}")
        for line in lines:
            where = f"{path}, line {lines.line_num}"
            question = _question(line, where)
            of_item = items.setdefault((line["item_id"] or "").strip(), {})
            if question.number in of_item:
                _log.warning(
                    "%s: proposition %d once more; the later holds", where, question.number
                )
            of_item[question.number] = question
    for item, of_item in items.items():
        parents = {parent for question in of_item.values() for parent in question.parents}
        if unknown := parents - of_item.keys():
            raise ValueError(f"{path}: item {item} has no proposition {min(unknown)}, a parent")
    if not items:
        raise ValueError(f"{path} has no questions: see {PAGE}")
    return {item: list(of_item.values()) for item, of_item in items.items()}


@contextlib.contextmanager
def _utf8(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV in UTF-8: {error}") from error


def _question(line: dict[str, str | None], where: str) -> Question:
    values = {name: (line[name] or "").strip() for name in _COLUMNS}
    if empty := [name for name, value in values.items() if not value]:
        raise ValueError(f"{where}: {', '.join(empty)} must not be empty")
    _, number, dependency, kind, text = values.values()
    parents = dependency.split(",")
    if not all(re.fullmatch(r"\s*[0-9]+\s*", each) for each in (number, *parents)):
        raise ValueError(
            f"{where}: proposition_id and dependency must be whole numbers, got {number!r} and "
            f"{dependency!r}"
        )
    known = tuple(parent for parent in dict.fromkeys(map(int, parents)) if parent)
    return Question(int(number), known, kind.partition("(")[0].strip(), text)
