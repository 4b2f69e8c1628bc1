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


def test_two_that_overlap_leave_it_as_it_was() -> None:
    """As of two threads, of which the first ends first."""
    own = gc.get_threshold()
    first, second = rare_collection(), rare_collection()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold()[0] >= 10_000
    second.__exit__(None, None, None)
    assert gc.get_threshold() == own
