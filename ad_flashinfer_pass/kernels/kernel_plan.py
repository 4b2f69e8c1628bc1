"""Which kernel runs an op, by the size of the step: what the op's node says in text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple


class Kernel(NamedTuple):
    """A kernel and how it is launched; in text ``split_decode/16``."""

    name: str
    options: tuple[int, ...] = ()
    """They change the launch, not what is computed."""

    @classmethod
    def parse(cls, text: str) -> Kernel:
        """The kernel that ``str`` wrote."""
        name, *options = text.split("/")
        return cls(name, tuple(map(int, options)))

    def __str__(self) -> str:
        return "/".join([self.name, *map(str, self.options)])


@dataclass(frozen=True)
class KernelPlan:
    """The kernels of an op by the size of the step; in text ``xqa 1=split_decode/16 8=xqa/2``."""

    default: Kernel
    """Of all other sizes."""
    by_size: Mapping[int, Kernel] = field(default_factory=dict)

    @staticmethod
    @cache
    def parse(text: str) -> KernelPlan:
        """The plan that ``str`` wrote; read once, since an op asks in each call.

        Raises:
            ValueError: it is none.
        """
        default, *others = text.split()
        by_size = (other.split("=") for other in others)
        return KernelPlan(Kernel.parse(default), {int(n): Kernel.parse(kernel) for n, kernel in by_size})

    def __str__(self) -> str:
        others = (f"{size}={kernel}" for size, kernel in sorted(self.by_size.items()))
        return " ".join([str(self.default), *others])

    def at(self, size: int) -> Kernel:
        """The kernel for a step of that size."""
        return self.by_size.get(size, self.default)

    @property
    def kernels(self) -> list[Kernel]:
        """Every kernel, the default first."""
        return [self.default, *self.by_size.values()]

    @property
    def names(self) -> list[str]:
        """Every kernel's name, the default's first."""
        return list(dict.fromkeys(kernel.name for kernel in self.kernels))
