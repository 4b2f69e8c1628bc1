"""Of how many layers a model was left."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layers:
    """How many of a model's layers are taken, the first ones."""

    taken: int
    of: int
    why: str

    def __str__(self) -> str:
        if self.taken == self.of:
            return f"all {self.of} layers ({self.why})"
        return f"the first {self.taken} of {self.of} layers ({self.why}; --layers {self.of} takes all)"
