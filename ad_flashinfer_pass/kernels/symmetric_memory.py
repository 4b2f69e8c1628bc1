"""Sums over memory that the GPUs of all ranks map: torch's kernels, for few bytes, where NCCL begins slowly.

one_shot: each rank reads what all others have, and sums it, in an order of its own: the bits are those of the
others with two ranks alone. two_shot: each rank sums a part and gives it to the others.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

MAX_BYTES = 16 * 2**20
"""Of one sum; NCCL is as fast beyond."""


def can_be_used(device: torch.device, num_ranks: int) -> bool:
    """Whether this GPU maps the memory of the others, and no group of ranks before this one has used it."""
    others = [rank for rank in range(num_ranks) if rank != device.index]
    peers = all(torch.cuda.can_device_access_peer(device, rank) for rank in others)
    return peers and all(group is dist.group.WORLD for group in _USED)


def kernels(num_ranks: int, num_bytes: int, dtype: torch.dtype) -> list[str]:
    """What can sum so many bytes, the same bits on each rank."""
    fits = num_bytes <= MAX_BYTES and num_bytes % (16 * num_ranks) == 0
    if not fits or dtype not in (torch.bfloat16, torch.float32):
        return []
    return ["one_shot", "two_shot"] if num_ranks == 2 else ["two_shot"]


_USED: list[object] = []
"""The group whose ranks have exchanged addresses; torch keeps them by the group's name, which comes again."""


def all_reduce(x: Tensor, kernel: str) -> Tensor:
    """The sum of the x of all ranks, by one of ``kernels``; the first call is of all ranks, and eager."""
    group = dist.group.WORLD
    assert group is not None
    buffer = _buffer(x.device).view(x.dtype)[: x.numel()].view(x.shape)
    out = torch.empty_like(x)
    if kernel == "one_shot":
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(buffer, x, "sum", group.group_name, out)
    else:
        buffer.copy_(x)
        torch.ops.symm_mem.two_shot_all_reduce_out(buffer, "sum", group.group_name, out)
    return out


@cache
def _buffer(device: torch.device) -> Tensor:
    """Memory that all ranks map, of one sum after the other: each ends when all ranks have read."""
    import torch.distributed._symmetric_memory as symmetric_memory

    group = dist.group.WORLD
    assert group is not None
    buffer: Tensor = symmetric_memory.empty(MAX_BYTES, dtype=torch.uint8, device=device)
    symmetric_memory.rendezvous(buffer, group.group_name)
    _USED.append(group)
    return buffer
