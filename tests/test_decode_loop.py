"""What benchmarks/decode_loop.py reads out of a trace, from one made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.decode_loop import analysed

KERNEL, BETWEEN, NUM_KERNELS, TAIL_KERNELS = 8.0, 2.0, 100, 2
AFTER_MODEL, COPY, AFTER_COPY = 5.0, 1.0, 30.0


def trace(num_steps: int) -> list[dict[str, Any]]:
    """Steps of a model's graph, a tail's graph, a copy and a wait; all kernels equally long and far apart."""
    events: list[dict[str, Any]] = []
    now, correlation = 0.0, 0

    def add(cat: str, name: str, duration: float, correlation: int) -> None:
        args = {"correlation": correlation}
        events.append({"ph": "X", "cat": cat, "name": name, "ts": now, "dur": duration, "args": args})

    for _ in range(num_steps):
        for num_kernels, after in ((NUM_KERNELS, AFTER_MODEL), (TAIL_KERNELS, BETWEEN)):
            correlation += 1
            add("cuda_runtime", "cudaGraphLaunch", 6.0, correlation)
            for index in range(num_kernels):
                add("kernel", "_prepare" if num_kernels > 50 and index == 0 else "k", KERNEL, correlation)
                now += KERNEL + (BETWEEN if index < num_kernels - 1 else after)
        add("gpu_memcpy", "Memcpy DtoH", COPY, 10_000)
        add("cuda_runtime", "cudaEventSynchronize", 100.0, 20_000)
        now += COPY + AFTER_COPY
    return events


def test_gaps_shares_and_waits_of_a_trace() -> None:
    """Each is what the trace was made of."""
    found = analysed(trace(10), 10)
    assert found["num_steps"] == 10
    assert found["kernels_of_a_step"] == NUM_KERNELS
    model = NUM_KERNELS * KERNEL + (NUM_KERNELS - 1) * BETWEEN + AFTER_MODEL
    tail = TAIL_KERNELS * (KERNEL + BETWEEN) + COPY + AFTER_COPY
    assert found["step_us"] == pytest.approx(model + tail)
    assert found["gap_us"]["median"] == pytest.approx(AFTER_MODEL)
    assert found["gap_us"]["max"] == pytest.approx(BETWEEN + AFTER_COPY), "the copy is no gap"
    # Of the last step the trace ends with its model.
    ours = KERNEL + (TAIL_KERNELS * KERNEL + COPY) * 9 / 10
    assert found["metadata_and_sampling_us"] == pytest.approx(ours)
    assert found["waits_a_step"] == {"cudaEventSynchronize": 1.0}
    assert found["graph_launches_a_step"] == 2.0


def test_a_trace_without_graphs_is_an_error() -> None:
    """It says what the trace has instead."""
    events = [event for event in trace(3) if event["name"] != "cudaGraphLaunch"]
    with pytest.raises(RuntimeError, match="no graph of the model was launched twice; the trace has"):
        analysed(events, 3)
