"""Kernels chosen by measurement, at warm-up, before anything is captured.

A kind of op brings a ``Subject``: the kernels worth timing, what their times depend on, and how to time them.
What was found is remembered on disk, by GPU, versions and what was timed. The choice goes into the nodes of
the graph, as the text of a ``KernelPlan``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch

from ad_flashinfer_pass.kernels import modules
from ad_flashinfer_pass.kernels.kernel_plan import Kernel, KernelPlan
from ad_flashinfer_pass.kernels.measure import read_choices, write_choices

K = TypeVar("K", bound=Hashable)


class Measured(NamedTuple):
    """What was found for one size."""

    kernels: list[str]
    """The best of each of the subject's kinds, in their order."""
    notes: list[str]
    """The times, a line each."""


class Subject(Protocol[K]):
    """Ops of a model that are tuned together."""

    kinds: list[K]
    """The kinds of them; those of one kind run the same kernel."""
    default: str
    """The kernel of sizes that were not measured."""
    device: torch.device

    def key(self, size: int) -> str:
        """What the times depend on beside the kernels, for steps of that many sequences or tokens."""

    def candidates(self, size: int) -> list[str]:
        """The kernels worth timing; none if steps of that size are not the subject's matter."""

    def measure(self, size: int, kernels: list[str]) -> Measured:
        """Time the candidates over the model's own memory, in captured graphs, and choose."""


def tune(
    subject: Subject[K],
    sizes: Sequence[int],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[K, str], list[str]]:
    """Choose for every size and kind.

    Args:
        subject: what is timed.
        sizes: of the steps that will be captured.
        on_progress: called with (done, all) sizes.

    Returns:
        The ``KernelPlan`` of each kind as text, and lines with the times.
    """
    known, notes = read_choices(), []
    chosen: dict[K, dict[int, Kernel]] = {kind: {} for kind in subject.kinds}
    by_size = {size: found for size in sizes if (found := subject.candidates(size))}
    for index, (size, candidates) in enumerate(by_size.items()):
        what = subject.key(size)
        if set(candidates) <= {subject.default}:
            notes.append(f"{what}: {subject.default}, with no other to compare")
            continue
        key = f"{_machine(subject.device)}: {what}, by {' '.join(candidates)}"
        if key not in known:
            with torch.cuda.device(subject.device if subject.device.type == "cuda" else -1):
                known[key] = subject.measure(size, candidates)
        kernels, found = known[key]
        notes += found
        for kind, kernel in zip(subject.kinds, kernels, strict=True):
            if kernel != subject.default:
                chosen[kind][size] = Kernel.parse(kernel)
        on_progress(index + 1, len(by_size))
    write_choices(known)
    default = Kernel.parse(subject.default)
    return {kind: str(KernelPlan(default, found)) for kind, found in chosen.items()}, notes


def fastest(times: Mapping[str, Sequence[float]], default: str, min_gain: float = 0.98) -> str:
    """The kernel with the smallest sum of its times relative to the best in each situation.

    Args:
        times: in each situation, by kernel.
        default: what is kept if nothing takes less than ``min_gain`` of its time, or noise would decide.
        min_gain: a share.
    """
    floors = [min(column) for column in zip(*times.values(), strict=True)]
    score = {name: sum(t / f for t, f in zip(row, floors, strict=True)) for name, row in times.items()}
    best = min(score, key=lambda name: score[name])
    return default if default in score and score[best] > min_gain * score[default] else best


def _machine(device: torch.device) -> str:
    packages = ("triton", "flashinfer-python")
    versions = [f"{package} {modules.installed(package)}" for package in packages]
    return ", ".join([torch.cuda.get_device_name(device), f"torch {torch.__version__}", *versions])
