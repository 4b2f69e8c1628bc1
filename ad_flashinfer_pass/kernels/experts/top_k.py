"""The largest of few numbers and their softmax, in Triton: torch's kernels take longer than the router."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ad_flashinfer_pass.kernels import overlap
from ad_flashinfer_pass.kernels.overlap import await_turn


def run(x: Tensor, k: int, softmax: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``ops.top_k`` in one kernel.

    Args:
        x: [rows, columns], contiguous, on a CUDA device; of at most ``arguments.MAX_COLUMNS`` columns.
        k: at most ``arguments.MAX_K``, and as many as there are columns.
        softmax: see ``ops.top_k``.
        dtype: of the values.
    """
    rows, columns = x.shape
    values = torch.empty((rows, k), dtype=dtype, device=x.device)
    index = torch.empty((rows, k), dtype=torch.int64, device=x.device)
    _top_k[(rows,)](
        x,
        values,
        index,
        columns,
        K=k,
        K_BLOCK=triton.next_power_of_2(k),
        SOFTMAX=softmax,
        COLUMNS=triton.next_power_of_2(columns),
        num_warps=1,
        **overlap.options(x.device, rows),
    )
    return values, index


@triton.jit
def _top_k(  # type: ignore[no-untyped-def]
    x,
    values,
    index,
    num_columns,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A row: numbers become integers of the same order that end in their column, so that no two are equal."""
    await_turn(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    number = tl.load(x + row * num_columns + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    bits = number.to(tl.int32, bitcast=True)
    bits = tl.where(number == number, bits, 0x7FC00000)  # NaN has a sign, too
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    keys = (ordered << 32) | (COLUMNS - 1 - columns)
    least = -0x7FFFFFFFFFFFFFFF - 1
    keys = tl.where(columns < num_columns, keys, least)
    places = tl.arange(0, K_BLOCK)
    chosen = tl.full((K_BLOCK,), float("-inf"), dtype=tl.float32)
    for place in tl.static_range(K):
        key = tl.max(keys, axis=0)
        keys = tl.where(keys == key, least, keys)
        best = (key >> 32).to(tl.int32)
        best = (best ^ ((best >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        chosen = tl.where(places == place, best, chosen)
        tl.store(index + row * K + place, COLUMNS - 1 - (key & 0xFFFFFFFF))
    if SOFTMAX != "none":
        largest = tl.max(chosen, axis=0)
        chosen = tl.exp(chosen - largest)
        if SOFTMAX == "all":
            total = tl.sum(tl.where(columns < num_columns, tl.exp(number - largest), 0.0), axis=0)
        else:
            total = tl.sum(chosen, axis=0)
        chosen /= total
    tl.store(values + row * K + places, chosen.to(values.dtype.element_ty), mask=places < K)
