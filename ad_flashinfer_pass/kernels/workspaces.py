"""Memory that kernels write beside their results, one set for each provider and device.

It is made at a kernel's first call, which must not be in a capture, and stays where it is: a captured graph
holds its address. ``release`` gives it back; the generation tells graphs captured before that they are stale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
_made: dict[tuple[Callable[[torch.device], object], torch.device], object] = {}
_generation = 0


def get(make: Callable[[torch.device], T], device: torch.device) -> T:
    """What ``make(device)`` returned when it was first asked for."""
    key = (make, device)
    if key not in _made:
        _made[key] = make(device)
    return _made[key]  # type: ignore[return-value]


def generation() -> int:
    """How often the memory was given back so far."""
    return _generation


def release() -> None:
    """Give all of it back; the next call of each kernel makes it anew, somewhere else."""
    global _generation
    _made.clear()
    _generation += 1
