"""Block table and place of each token as one Triton kernel, from lengths and pages that stay on the device.

Unlike ``kernels.metadata`` it needs neither the page size nor the past length: a token's place is its
position among the keys that its sequence has pages for, which the length with cache gives, from the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def prepare(
    num_tokens: int,
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
        num_tokens: new tokens with padding.
        num_seqs: sequences of this step; what the tensors hold beyond is not read.
        cu_seqlen: int32 [>= num_seqs + 1], exclusive prefix sum of the new tokens.
        seq_len_with_cache: int32 [>= num_seqs], keys of each sequence, the new ones included.
        cache_loc: int32 [*], page ids of all sequences, concatenated.
        cu_num_pages: int32 [>= num_seqs + 1], exclusive prefix sum of the pages.
        block_table: int32 [rows, blocks], contiguous. Page ids; 0 where a sequence has none.
        token_rows: int32 [>= num_tokens]. Sequence of each token; -1 for padding.
        token_positions: int32 [>= num_tokens]. Position of each token among the keys of its sequence; -1 for
            padding.
    """
    max_rows, max_blocks = block_table.shape
    _prepare[(max_rows + 1,)](
        cu_seqlen,
        seq_len_with_cache,
        cache_loc,
        cu_num_pages,
        block_table,
        token_rows,
        token_positions,
        num_tokens,
        num_seqs,
        max_rows,
        max_blocks,
        BLOCK=min(_BLOCK, triton.next_power_of_2(max(max_blocks, 32))),
    )


@triton.jit(do_not_specialize=["num_tokens", "num_seqs", "max_rows", "max_blocks"])
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
    max_rows,
    max_blocks,
    BLOCK: tl.constexpr,
):
    """Program i < max_rows: row i of the block table and the tokens of its sequence; the last: padding."""
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    is_seq = row < num_seqs
    first_page = tl.load(cu_num_pages + row, mask=is_seq, other=0)
    num_pages = tl.load(cu_num_pages + row + 1, mask=is_seq, other=0) - first_page
    if row < max_rows:
        for start in range(0, max_blocks, BLOCK):
            blocks = start + lanes
            pages = tl.load(cache_loc + first_page + blocks, mask=blocks < num_pages, other=0)
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
    if row == max_rows:
        for start in range(tl.load(cu_seqlen + num_seqs), num_tokens, BLOCK):
            tokens = start + lanes
            tl.store(token_rows + tokens, tokens * 0 - 1, mask=tokens < num_tokens)
            tl.store(token_positions + tokens, tokens * 0 - 1, mask=tokens < num_tokens)
