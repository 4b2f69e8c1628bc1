"""Python's garbage collector, while modules and graphs are made, and while a model runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_OBJECTS = 10_000
_LOCK = Lock()
_before: list[tuple[int, int, int]] = []
"""For each that is within: the thresholds that were there before the first."""


@contextmanager
def rare_collection() -> Iterator[None]:
    """Let the collector look for cycles less often: millions of objects are made that stay.

    A start takes an eighth less of the CPU's time so. Threads may be within at the same time.
    """
    with _LOCK:
        first, *rest = before = gc.get_threshold()
        _before.append(_before[0] if _before else before)
        gc.set_threshold(first and max(_OBJECTS, first), *rest)  # 0: it never runs
    try:
        yield
    finally:
        with _LOCK:
            before = _before.pop()
            if not _before:
                gc.set_threshold(*before)


@contextmanager
def new_objects_alone() -> Iterator[None]:
    """Let the collector look for cycles among the objects alone that are made from now on.

    To look at all that a model consists of takes it tenths of a second, in which a GPU has nothing to do.
    Where somebody has called ``gc.freeze``, nothing changes.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
