"""Block table and place of each token as one Triton kernel, from lengths and pages that stay on the device.

Unlike ``cache.prepare_metadata`` it needs neither the page size nor the past length: a token's place is its
position among the keys that its sequence has pages for, which the length with cache gives, from the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def prepare(
    num_seqs: int,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    cache_loc: Tensor,
    cu_num_pages: Tensor,
    block_table: Tensor,
    token_rows: Tensor,
    token_positions: Tensor,
) -> None:
    """Fill the last three arguments.

    Args:
        num_seqs: sequences of this step; what the tensors hold beyond is not read.
        cu_seqlen: int32 [>= num_seqs + 1], exclusive prefix sum of the new tokens.
        seq_len_with_cache: int32 [>= num_seqs], keys of each sequence, the new ones included.
        cache_loc: int32 [*], page ids of all sequences, concatenated.
        cu_num_pages: int32 [>= num_seqs + 1], exclusive prefix sum of the pages.
        block_table: int32 [rows, blocks], contiguous. Page ids; behind the last page of a sequence that page
            again, because kernels read ahead; 0 where a sequence has none.
        token_rows: int32 [>= tokens]. Sequence of each token; what lies behind the last is left alone.
        token_positions: int32 [>= tokens]. Position of each token among the keys of its sequence.
    """
    max_rows, max_blocks = block_table.shape
    _prepare[(max_rows,)](
        cu_seqlen,
        seq_len_with_cache,
        cache_loc,
        cu_num_pages,
        block_table,
        token_rows,
        token_positions,
        token_rows.numel(),
        num_seqs,
        max_blocks,
        BLOCK=min(_BLOCK, triton.next_power_of_2(max(max_blocks, 32))),
    )


@triton.jit(do_not_specialize=["num_tokens", "num_seqs", "max_blocks"])
def _prepare(  # type: ignore[no-untyped-def]
    cu_seqlen,
    seq_len_with_cache,
    cache_loc,
    cu_num_pages,
    block_table,
    token_rows,
    token_positions,
    num_tokens,
    num_seqs,
    max_blocks,
    BLOCK: tl.constexpr,
):
    """Program i: row i of the block table and the tokens of its sequence."""
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    is_seq = row < num_seqs
    first_page = tl.load(cu_num_pages + row, mask=is_seq, other=0)
    num_pages = tl.load(cu_num_pages + row + 1, mask=is_seq, other=0) - first_page
    for start in range(0, max_blocks, BLOCK):
        blocks = start + lanes
        is_page = blocks < tl.minimum(max_blocks, num_pages * max_blocks)
        pages = tl.load(cache_loc + first_page + tl.minimum(blocks, num_pages - 1), mask=is_page, other=0)
        tl.store(block_table + row.to(tl.int64) * max_blocks + blocks, pages, mask=blocks < max_blocks)
    if is_seq:
        first = tl.load(cu_seqlen + row)
        end = tl.load(cu_seqlen + row + 1)
        past = tl.load(seq_len_with_cache + row) - end
        for start in range(first, end, BLOCK):
            tokens = start + lanes
            is_token = (tokens < end) & (tokens < num_tokens)
            tl.store(token_rows + tokens, tokens * 0 + row, mask=is_token)
            tl.store(token_positions + tokens, past + tokens, mask=is_token)
