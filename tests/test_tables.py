"""The tables of the documentation are those of the committed results."""

from __future__ import annotations

import pytest

from benchmarks import tables


@pytest.mark.parametrize("name", tables.PAGES)
def test_tables_are_made_from_the_results(name: str) -> None:
    """Whoever commits new results runs ``python benchmarks/tables.py``."""
    assert tables.updated(name) == (tables.ROOT / name).read_text()
