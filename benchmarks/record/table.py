"""One table printer: columns of the rows of a result, for a terminal or as Markdown."""

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple


class Column(NamedTuple):
    """`value` is a field of the row ("a.b" of one in one), by default that of its head, or a
    function of it; numbers have a `form`, such as "{:.1f}", and are aligned to the right."""

    head: str
    value: str | Callable[[Any], object] = ""
    form: str | None = None

    def cell(self, row) -> str:
        value = attrgetter(self.value or self.head) if isinstance(self.value, str) else self.value
        value = value(row)
        return "" if value is None else (self.form or "{}").format(value)


def text(rows: Iterable, columns: Sequence[Column]) -> str:
    """For a terminal, a line a row under one of heads."""
    lines = [[c.head for c in columns], *([c.cell(row) for c in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]

    def align(column: Column, cell: str, width: int) -> str:
        return cell.rjust(width) if column.form else cell.ljust(width)

    return "\n".join("  ".join(map(align, columns, cells, widths)).rstrip() for cells in lines)


def markdown(rows: Iterable, columns: Sequence[Column]) -> str:
    rule = ["---:" if c.form else "---" for c in columns]
    lines = [[c.head for c in columns], rule, *([c.cell(row) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
