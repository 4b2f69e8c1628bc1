"""Zeroes pages of the pools of all layers in one launch of a Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
"""Words that one program writes."""


class Pools:
    """Pools that have the same pages.

    Args:
        pools: int64 [num_pages, words of a page] each, contiguous, on one device, where they stay.
    """

    def __init__(self, pools: Sequence[Tensor]) -> None:
        widths = [pool.shape[1] for pool in pools]
        addresses = [pool.data_ptr() for pool in pools]
        self._pools = torch.tensor([*addresses, *widths], device=pools[0].device)
        self._grid = (triton.cdiv(max(widths), _BLOCK), len(pools))

    def clear(self, pages: Tensor) -> None:
        """Zero these pages, int64 [n] on the device, of all pools."""
        with torch.cuda.device_of(pages):
            _clear[(len(pages), *self._grid)](self._pools, pages, BLOCK=_BLOCK)


@triton.jit
def _clear(pools, pages, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    pool, num_pools = tl.program_id(2), tl.num_programs(2)
    width = tl.load(pools + num_pools + pool)
    start = tl.load(pools + pool).to(tl.pointer_type(tl.int64))
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    page = start + tl.load(pages + tl.program_id(0)) * width
    tl.store(page + places, tl.zeros((BLOCK,), tl.int64), mask=places < width)
