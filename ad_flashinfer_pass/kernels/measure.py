"""Timing of kernels as a captured step runs them, and the file that remembers what was found."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.files import write_file

_LAUNCHES = 16


def microseconds(launches: Sequence[Callable[[], object]]) -> float:
    """Time of a launch in a captured graph of them all, repeated until there are a few; the best of four."""
    turn = [launches[i % len(launches)] for i in range(max(_LAUNCHES, len(launches)))]
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        turn[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
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
    return 1e3 * best / len(turn)


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """Always the same: cuBLAS keeps 32 MiB for every stream on which it has run."""
    return torch.cuda.Stream(device)


def cache_file() -> Path:
    """Where choices are remembered: below XDG_CACHE_HOME, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "ad_flashinfer_pass" / "kernel_choices.json"


def read_choices() -> dict[str, Any]:
    """What was found before, by what it depends on."""
    try:
        known = json.loads(cache_file().read_text())
    except (OSError, ValueError, RecursionError):
        return {}  # measured anew
    return known if isinstance(known, dict) else {}


def write_choices(known: dict[str, Any]) -> None:
    """Remember all of it."""
    file = cache_file()
    with suppress(OSError, ConfigError):  # a read-only home: measured again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(known, indent=1) + "\n")
