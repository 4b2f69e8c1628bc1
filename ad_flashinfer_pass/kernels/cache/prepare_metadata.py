"""Block table and slots of a step as one Triton kernel, from lengths and pages that stay on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def prepare_metadata(
    num_tokens: int,
    num_seqs: int,
    cu_seqlen: Tensor,
    input_pos: Tensor,
    cache_loc: Tensor,
    cu_num_pages: Tensor,
    max_blocks_per_seq: int,
    page_size: int,
) -> tuple[Tensor, Tensor]:
    """See ``ops.prepare_metadata``; of the arguments only ``num_tokens`` and ``num_seqs`` are the host's."""
    max_batch_size = input_pos.shape[0]
    block_table = cache_loc.new_empty((max_batch_size, max_blocks_per_seq))
    slot_mapping = cache_loc.new_empty(num_tokens, dtype=torch.int64)
    _prepare[(max_batch_size + 1,)](
        cu_seqlen,
        input_pos,
        cache_loc,
        cu_num_pages,
        block_table,
        slot_mapping,
        num_tokens,
        num_seqs,
        max_batch_size,
        max_blocks_per_seq,
        PAGE_SIZE=page_size,
        BLOCK=min(_BLOCK, triton.next_power_of_2(max(max_blocks_per_seq, 32))),
    )
    return block_table, slot_mapping


@triton.jit(do_not_specialize=["num_tokens", "num_seqs", "max_batch_size", "max_blocks"])
def _prepare(  # type: ignore[no-untyped-def]
    cu_seqlen,
    input_pos,
    cache_loc,
    cu_num_pages,
    block_table,
    slot_mapping,
    num_tokens,
    num_seqs,
    max_batch_size,
    max_blocks,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i < max_batch_size: row i of the block table and the slots of its tokens; the last: padding."""
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    is_seq = row < num_seqs
    first_page = tl.load(cu_num_pages + row, mask=is_seq, other=0)
    num_pages = tl.load(cu_num_pages + row + 1, mask=is_seq, other=0) - first_page
    if row < max_batch_size:
        for start in range(0, max_blocks, BLOCK):
            blocks = start + lanes
            pages = tl.load(cache_loc + first_page + blocks, mask=blocks < num_pages, other=0)
            tl.store(block_table + row.to(tl.int64) * max_blocks + blocks, pages, mask=blocks < max_blocks)
    if is_seq:
        first = tl.load(cu_seqlen + row)
        end = tl.minimum(tl.load(cu_seqlen + row + 1), num_tokens)
        past = tl.load(input_pos + row) - first
        for start in range(first, end, BLOCK):
            tokens = start + lanes
            position = tl.minimum(tl.maximum(past + tokens, 0), max_blocks * PAGE_SIZE - 1)
            block = position // PAGE_SIZE
            is_token = tokens < end
            page = tl.load(cache_loc + first_page + block, mask=is_token & (block < num_pages), other=0)
            slot = page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE
            tl.store(slot_mapping + tokens, slot, mask=is_token)
    if row == max_batch_size:
        for start in range(tl.load(cu_seqlen + num_seqs), num_tokens, BLOCK):
            tokens = start + lanes
            tl.store(slot_mapping + tokens, tl.zeros((BLOCK,), tl.int64), mask=tokens < num_tokens)


def prefix_sums(lengths: Tensor) -> Tensor:
    """Where each of these would begin and end, one behind the other, in one launch where torch has four.

    Args:
        lengths: int32 [n].

    Returns:
        int32 [n + 1].
    """
    sums = lengths.new_empty(lengths.shape[0] + 1)
    _sum_up[(1,)](lengths, sums, lengths.shape[0], ROWS=triton.next_power_of_2(lengths.shape[0]))
    return sums


@triton.jit(do_not_specialize=["num_rows"])
def _sum_up(lengths, sums, num_rows, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.arange(0, ROWS)
    ends = tl.cumsum(tl.load(lengths + rows, mask=rows < num_rows, other=0), axis=0)
    tl.store(sums, 0)
    tl.store(sums + 1 + rows, ends, mask=rows < num_rows)
