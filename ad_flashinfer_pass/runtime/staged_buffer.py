"""Small tensors that the host writes for each step, and the device reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

_STAGES = 4
_ALIGNMENT = 16


class StagedBuffer:
    """One device buffer with named parts, and pinned copies of it that are written in turn.

    On a CPU they are the same memory. Elsewhere a copy may still wait on the device for the steps before it,
    while the next one is written: it has another stage.

    Args:
        fields: dtype and shape of each part; of the last one only what is used is copied.
        device: where the buffer is.
    """

    def __init__(self, fields: dict[str, tuple[torch.dtype, tuple[int, ...]]], device: torch.device) -> None:
        sizes = [_round_up(dtype.itemsize * prod(shape)) for dtype, shape in fields.values()]
        starts = [0, *accumulate(sizes)]
        is_cuda = device.type == "cuda"
        num_stages = 1 if device.type == "cpu" else _STAGES
        self._stages = torch.zeros(num_stages, starts[-1], dtype=torch.uint8, pin_memory=is_cuda)
        self._on_device = self._stages[0] if device.type == "cpu" else self._stages[0].to(device)
        self._events = [torch.cuda.Event() for _ in range(num_stages)] if is_cuda else []
        self._last = (starts[-2], next(reversed(fields.values()))[0].itemsize)
        self._stage = 0

        def views_of(buffer: Tensor) -> dict[str, Tensor]:
            return {
                name: buffer[start : start + dtype.itemsize * prod(shape)].view(dtype).view(shape)
                for start, (name, (dtype, shape)) in zip(starts, fields.items(), strict=False)
            }

        self.views = views_of(self._on_device)
        # numpy takes a short list ten times faster than torch.
        self._arrays = [
            {name: view.numpy() for name, view in views_of(stage).items()} for stage in self._stages
        ]

    def next_stage(self) -> Callable[[str, Sequence[Any] | np.ndarray[Any, Any]], None]:
        """What writes the first elements of a part. Waits for the copy ``_STAGES`` steps ago, if it must."""
        self._stage = (self._stage + 1) % len(self._stages)
        if self._events:
            self._events[self._stage].synchronize()
        arrays = self._arrays[self._stage]

        def write(name: str, values: Sequence[Any] | np.ndarray[Any, Any]) -> None:
            if len(values):
                arrays[name][: len(values)] = values

        return write

    def copy_to_device(self, num_last: int) -> None:
        """Copy what was written, with this many elements of the last part."""
        stage = self._stages[self._stage]
        if stage.data_ptr() == self._on_device.data_ptr():
            return
        end = self._last[0] + num_last * self._last[1]
        self._on_device[:end].copy_(stage[:end], non_blocking=True)
        if self._events:
            self._events[self._stage].record(torch.cuda.current_stream(self._on_device.device))


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
