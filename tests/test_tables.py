"""The tables of the documentation are those of the committed results."""

from __future__ import annotations

from benchmarks import tables


def test_tables_are_made_from_the_results() -> None:
    """Whoever commits new results runs ``python benchmarks/tables.py``."""
    page = tables.PAGE.read_text()
    assert tables.updated(page) == page
