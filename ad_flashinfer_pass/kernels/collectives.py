"""What the ranks of a model send each other in a step: sums, and parts beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError, local
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.kernels import symmetric_memory
from ad_flashinfer_pass.kernels.kernel_plan import KernelPlan

T = TypeVar("T")
# torch 2.13 has another name for it.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Processes:
    """The processes of torch.distributed's default group, this one among them.

    A sum is the same on all of them, bit by bit: NCCL and gloo send each part of it from one rank to the
    others, and what symmetric memory adds is added in one order.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def all_reduce(self, x: Tensor, plan: str) -> Tensor:
        """The sum of the x of all ranks."""
        kernel = KernelPlan.parse(plan).at(x.numel() // x.shape[-1]).name
        if kernel != "torch" and x.device.type == "cuda":
            return symmetric_memory.all_reduce(x, kernel)
        total = x.clone()
        dist.all_reduce(total)
        return total

    def all_gather(self, x: Tensor, size: int) -> Tensor:
        """Columns beside each other, up to ``size``."""
        missing = -(-size // self.size) - x.shape[-1]
        padded = F.pad(x, (0, missing)) if missing else x
        rows = padded.flatten(0, -2)
        parts = rows.new_empty((self.size * len(rows), rows.shape[-1]))
        _gather(parts, rows)
        whole = parts.unflatten(0, (self.size, len(rows))).transpose(0, 1).flatten(1)
        return whole[:, :size].contiguous().view(*x.shape[:-1], size)


class _Thread:
    """One of some threads that stand for ranks, in one process."""

    def __init__(self, rank: int, parts: list[Tensor | None], barrier: Barrier) -> None:
        self.rank, self.size = rank, len(parts)
        self._parts, self._barrier = parts, barrier

    def all_reduce(self, x: Tensor, plan: str) -> Tensor:
        parts = self._all(x)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def all_gather(self, x: Tensor, size: int) -> Tensor:
        return torch.cat(self._all(x), -1)

    def _all(self, x: Tensor) -> list[Tensor]:
        self._parts[self.rank] = x
        self._barrier.wait()
        parts = [part for part in self._parts if part is not None]
        self._barrier.wait()
        return parts


_THREAD = local()


def least(number: int) -> int:
    """The smallest of the numbers of all processes of the default group, if there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)


def most(number: float) -> float:
    """The largest of the numbers of all processes of the default group."""
    found = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def in_threads(runs: Sequence[Callable[[], T]]) -> list[T]:
    """What some functions return, each run as a rank of its own in a thread of this process."""
    parts: list[Tensor | None] = [None] * len(runs)
    barrier = Barrier(len(runs))

    def run(rank: int) -> T:
        _THREAD.rank = _Thread(rank, parts, barrier)
        try:
            return runs[rank]()
        except BaseException:
            barrier.abort()  # else the others would wait for ever
            raise

    with ThreadPoolExecutor(len(runs)) as pool:
        futures = [pool.submit(run, rank) for rank in range(len(runs))]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda each: isinstance(each, BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


def current() -> Processes | _Thread:
    """The ranks of this process, or the thread that stands for one.

    Raises:
        ConfigError: there are none.
    """
    if (thread := getattr(_THREAD, "rank", None)) is not None:
        return thread
    if not dist.is_initialized():
        raise ConfigError(
            "a model of several ranks runs where torch.distributed has a process group: call "
            "torch.distributed.init_process_group first, or build_model, which starts the ranks itself."
        )
    return Processes()
