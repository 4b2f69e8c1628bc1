"""``move_weights``: from files that are mapped into memory to a GPU."""

from __future__ import annotations

from itertools import chain, cycle

import torch
from torch import Tensor, nn

_STAGE_BYTES = 64 * 2**20


def move_weights(module: nn.Module, device: torch.device) -> nn.Module:
    """``module.to(device)``; to a GPU by two stages of pinned memory.

    safetensors maps its files, so that reading a weight means a page fault for each 4 KiB. All cores take
    part in the copy to a stage, while the GPU reads the other one; ``to`` alone does both by one core.
    """
    on_cpu = {id(t): t for t in chain(module.parameters(), module.buffers()) if t.device.type == "cpu"}
    if device.type == "cuda" and on_cpu:
        with torch.cuda.device(device):
            stages = cycle([_Stage(), _Stage()])
            for tensor in on_cpu.values():
                if tensor.is_contiguous():
                    moved = torch.empty_like(tensor.data, device=device)
                    parts = (t.view(-1).view(torch.uint8).split(_STAGE_BYTES) for t in (tensor.data, moved))
                    for source, target in zip(*parts, strict=True):
                        next(stages).send(source, target)
                    tensor.data = moved
            torch.cuda.synchronize(device)  # the stages are freed
    return module.to(device)


class _Stage:
    """Pinned memory that the current GPU reads."""

    def __init__(self) -> None:
        self._memory = torch.empty(_STAGE_BYTES, dtype=torch.uint8, pin_memory=True)
        self._was_read = torch.cuda.Event()

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copy bytes of the CPU to the GPU; returns before they are there."""
        self._was_read.synchronize()
        target.copy_(self._memory[: len(source)].copy_(source), non_blocking=True)
        self._was_read.record()
