"""What kernels keep for one captured graph, and renew before each replay.

An op takes tensors alone, so it cannot be told for which graph it runs: that is set around the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

from torch import Tensor


class Renewed(Protocol):
    """What one kernel keeps."""

    def before_replay(self, inputs: Mapping[str, Tensor]) -> None:
        """Make ready for the inputs of the graph, by name, which are those of the next replay."""


T = TypeVar("T", bound=Renewed)


class GraphState:
    """Of one graph, from its warm-up on for as long as it is replayed."""

    def __init__(self) -> None:
        self._kept: dict[Callable[[], Renewed], Renewed] = {}

    @contextmanager
    def begin_capture(self) -> Iterator[None]:
        """Within it kernels run as in this graph: once to make what they keep, then to be captured."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def before_replay(self, inputs: Mapping[str, Tensor]) -> None:
        """Renew all that is kept."""
        for kept in self._kept.values():
            kept.before_replay(inputs)

    def keep(self, make: Callable[[], T]) -> T:
        """What ``make()`` returned when it was first asked for."""
        if make not in self._kept:
            self._kept[make] = make()
        return self._kept[make]  # type: ignore[return-value]


_current: ContextVar[GraphState | None] = ContextVar("graph_state", default=None)


def current() -> GraphState | None:
    """Of the graph for which kernels run now; None: they run eagerly."""
    return _current.get()
