"""Tables for a terminal: narrow columns are folded and not cut, layers that are alike are one row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_ENVIRONMENT = re.compile(r"/[^\s()]*/(?:site|dist)-packages/")


def table(*columns: str, title: str | None = None) -> Table:
    """A table in which no text is lost, however narrow the terminal."""
    from rich.table import Table

    made = Table(title=title)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def short(text: str) -> str:
    """A text without the path of the environment in which a source file lies."""
    return _ENVIRONMENT.sub("", text)


def source_line(where: str) -> str:
    """The source line in ``graph.edit.where``'s words about a node."""
    return short(where.partition(" (")[2].rstrip(")"))


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: 0-3, 7, 9-12."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def folded(rows: Iterable[tuple[str, ...]]) -> list[tuple[list[int], tuple[str, ...]]]:
    """Rows that differ in the numbers of their layers alone, as one.

    Returns:
        The places of the rows that became one, and its cells, which name all of their numbers.
    """
    groups: dict[tuple[str, ...], list[tuple[int, tuple[str, ...]]]] = {}
    for place, row in enumerate(rows):
        kind = tuple(_NUMBER.sub("#", cell, count=1) for cell in row)
        groups.setdefault(kind, []).append((place, row))
    return [
        ([place for place, _ in same], tuple(map(_joined, zip(*(row for _, row in same), strict=True))))
        for same in groups.values()
    ]


# Of a module, and of a pool.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=kv_cache_)\d+$")


def _joined(cells: tuple[str, ...]) -> str:
    """A cell of rows that became one; they differ in one number at the most."""
    numbers = sorted({int(match[0]) for cell in cells if (match := _NUMBER.search(cell))})
    if len(numbers) < 2:
        return cells[0]
    return _NUMBER.sub(f"[{ranges(numbers)}]", cells[0], count=1)
