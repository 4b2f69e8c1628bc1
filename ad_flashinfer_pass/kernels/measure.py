"""Kernels chosen by measurement, at warm-up, before anything is captured.

A kind of op brings a ``Subject``: the kernels worth timing, what their times depend on, and how to time them.
What was found is remembered on disk, by GPU, versions and what was timed. The choice goes into the nodes of
the graph, as the text of a ``KernelPlan``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist

from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.files import cache_folder, write_file
from ad_flashinfer_pass.kernels import modules
from ad_flashinfer_pass.kernels.kernel_plan import Kernel, KernelPlan

K = TypeVar("K", bound=Hashable)
_LAUNCHES = 16


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

    def alike(self, size: int) -> Hashable:
        """The same for sizes that share a choice; the largest of them is measured."""

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
        on_progress: called with (done, all) measurements.

    Returns:
        The ``KernelPlan`` of each kind as text, and lines with the times.
    """
    notes: list[str] = []
    known, new = read_choices(), dict[str, Any]()
    chosen: dict[K, dict[int, Kernel]] = {kind: {} for kind in subject.kinds}
    packages = ("torch", "triton", "flashinfer-python", "ad-flashinfer-pass")
    versions = " ".join(f"{package} {modules.installed(package)}" for package in packages)
    groups: dict[Hashable, list[int]] = {}
    for size in sorted(sizes):
        if subject.candidates(size):
            groups.setdefault(subject.alike(size), []).append(size)
    for index, group in enumerate(groups.values()):
        size, candidates = group[-1], subject.candidates(group[-1])
        if set(candidates) <= {subject.default}:
            notes.append(f"size {size}: {subject.default}, with no other to compare")
            continue
        gpu = torch.cuda.get_device_name(subject.device)
        key = f"{gpu}, {versions}: {subject.key(size)}, by {' '.join(candidates)}"
        measured = _measured(known.get(key), candidates, len(subject.kinds))
        if measured is None:
            with torch.cuda.device(subject.device if subject.device.type == "cuda" else -1):
                measured = new[key] = subject.measure(size, candidates)
        notes += measured.notes
        for kind, kernel in zip(subject.kinds, measured.kernels, strict=True):
            if kernel != subject.default:
                chosen[kind].update(dict.fromkeys(group, Kernel.parse(kernel)))
        on_progress(index + 1, len(groups))
    write_choices(new)
    default = Kernel.parse(subject.default)
    return {kind: str(KernelPlan(default, found)) for kind, found in chosen.items()}, notes


def _measured(entry: object, candidates: Sequence[str], num_kinds: int) -> Measured | None:
    """An entry of the file, None if there is none or somebody wrote something else there."""
    match entry:
        case [[*kernels], [*notes]] if len(kernels) == num_kinds and all(k in candidates for k in kernels):
            return Measured([str(kernel) for kernel in kernels], [str(note) for note in notes])
    return None


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


def compile_together(launches: Iterable[Callable[[], object]], device: torch.device) -> None:
    """Launch each once, in threads: Triton's compiler, which does not need Python's lock, takes the longest.

    Args:
        launches: of Triton's kernels; cuBLAS would keep memory for each thread.
        device: on which they run.
    """
    if device.type == "cuda":
        with ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)) as threads:
            for done in [threads.submit(launch) for launch in launches]:
                done.result()
        torch.cuda.synchronize(device)


def microseconds(launches: Sequence[Callable[[], object]]) -> float:
    """Time of a launch in a captured graph of them all, repeated until there are a few; the best of four."""
    turn = [launches[i % len(launches)] for i in range(max(_LAUNCHES, len(launches)))]
    return _of_a_graph(turn) / len(turn)


def cold_microseconds(launches: Sequence[Callable[[], object]], device: torch.device) -> float:
    """As ``microseconds``, of launches whose data and code are not in the L2 cache of a CUDA device.

    Before each, so much else is read that nothing of the one before is left there.
    """
    turn = [launches[i % len(launches)] for i in range(max(_LAUNCHES, len(launches)))]
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    evict = partial(torch.amax, torch.zeros(size // 4, dtype=torch.float32, device=device))
    both = [each for launch in turn for each in (evict, launch)]
    return (_of_a_graph(both) - _of_a_graph([evict] * len(turn))) / len(turn)


def _of_a_graph(turn: Sequence[Callable[[], object]]) -> float:
    """Microseconds of a captured graph, the best of four."""
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in turn[:2]:
            launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # With ranks, NCCL's watchdog asks for events from a thread of its own, which must not end the capture.
    mode = "thread_local" if dist.is_initialized() else "global"
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        for launch in turn:
            launch()
    best = float("inf")
    for _ in range(4):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return 1e3 * best


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """Always the same: cuBLAS keeps 32 MiB for every stream on which it has run."""
    return torch.cuda.Stream(device)


def cache_file() -> Path | None:
    """Where choices are remembered, if they can be."""
    folder = cache_folder("choices")
    return None if folder is None else folder / "kernels.json"


def read_choices() -> dict[str, Any]:
    """What was found before, by what it depends on."""
    try:
        file = cache_file()
        known = {} if file is None else json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}  # measured anew
    return known if isinstance(known, dict) else {}


def write_choices(new: Mapping[str, Any]) -> None:
    """Remember more, beside what other processes have found in the meantime."""
    file = cache_file()
    with suppress(OSError, ConfigError):  # a full disk: measured again next time
        if new and file is not None:
            write_file(file, json.dumps({**read_choices(), **new}, indent=1) + "\n")
