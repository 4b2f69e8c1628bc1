"""What kernels keep: memory of a device, and what belongs to one captured graph.

An op takes tensors alone, so that neither can be an argument. Memory that kernels write beside their results,
one set for each provider and device, is made at a kernel's first call, which must not be in a capture, and
stays where it is: a captured graph holds its address. ``release`` gives it back; the generation tells graphs
captured before that they are stale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_made: dict[tuple[Callable[[torch.device], object], torch.device], object] = {}
_generation = 0


def get(make: Callable[[torch.device], T], device: torch.device) -> T:
    """What ``make(device)`` returned when it was first asked for."""
    key = (make, device)
    if key not in _made:
        _made.setdefault(key, make(device))  # another thread may have been faster
    return _made[key]  # type: ignore[return-value]


def generation() -> int:
    """How often the memory was given back so far."""
    return _generation


def release() -> None:
    """Give all of it back; the next call of each kernel makes it anew, somewhere else."""
    global _generation
    _made.clear()
    _generation += 1


class Renewed(Protocol):
    """What a kernel keeps for a graph."""

    def before_replay(self, inputs: Mapping[str, Tensor]) -> None:
        """Make ready for the graph's inputs, by name, as they are at the next replay."""


R = TypeVar("R", bound=Renewed)


class GraphState:
    """What kernels keep for one captured graph, from its warm-up on."""

    def __init__(self) -> None:
        self._kept: dict[Callable[[], Renewed], Renewed] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no kernel keeps anything for it."""
        return not self._kept

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


_current: ContextVar[GraphState | None] = ContextVar("graph_state", default=None)


def of_graph(make: Callable[[], R]) -> R | None:
    """What ``make()`` returned when the graph that is captured first asked for it; None: there is none."""
    graph = _current.get()
    if graph is None:
        return None
    if make not in graph._kept:
        graph._kept[make] = make()
    return graph._kept[make]  # type: ignore[return-value]
