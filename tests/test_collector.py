"""Python's garbage collector during a start, and while a model runs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from ad_flashinfer_pass.collector import new_objects_alone, rare_collection
from ad_flashinfer_pass.runtime.llm import LLM
from tests.runtime.toy_model import ToyModel


class _Knot:
    """Refers to itself."""

    def __init__(self) -> None:
        self.own = self


def _dropped_knot() -> weakref.ref[_Knot]:
    return weakref.ref(_Knot())


@pytest.fixture
def unfrozen() -> Iterator[None]:
    """As in a process in which nobody has frozen anything."""
    gc.unfreeze()
    yield
    gc.freeze()


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


@pytest.mark.usefixtures("unfrozen")
def test_cycles_from_before_wait_and_those_made_within_do_not() -> None:
    gc.disable()
    try:
        old = _dropped_knot()
        with new_objects_alone():
            new = _dropped_knot()
            gc.collect()
            assert new() is None
            assert old() is not None
    finally:
        gc.enable()
    gc.collect()
    assert old() is None


def test_what_somebody_has_frozen_stays_frozen() -> None:
    gc.freeze()
    with new_objects_alone():
        pass
    assert gc.get_freeze_count() > 0


@pytest.mark.usefixtures("unfrozen")
def test_the_collector_leaves_a_model_alone_while_it_generates() -> None:
    counts = []
    LLM(ToyModel()).generate(
        [[1, 2]], max_new_tokens=2, on_progress=lambda _: counts.append(gc.get_freeze_count())
    )
    assert counts
    assert all(counts)
    assert gc.get_freeze_count() == 0
