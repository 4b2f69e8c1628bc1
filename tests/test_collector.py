"""Python's garbage collector during a start."""

from __future__ import annotations

import gc

import pytest

from ad_flashinfer_pass.collector import rare_collection


@pytest.mark.parametrize(("before", "within"), [(700, 10_000), (50_000, 50_000), (0, 0)])
def test_it_runs_less_often_and_then_as_before(before: int, within: int) -> None:
    """Never more often than it did, and not at all where somebody has stopped it."""
    own = gc.get_threshold()
    try:
        gc.set_threshold(before, *own[1:])
        with rare_collection():
            assert gc.get_threshold()[0] == within
        assert gc.get_threshold() == (before, *own[1:])
    finally:
        gc.set_threshold(*own)
