"""The end of a greedy decode step as one Triton kernel: argmax, and the metadata of the next step."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def advance_greedily(logits: Tensor, tokens: Tensor, views: Mapping[str, Tensor], idle: int) -> None:
    """See ``SequenceInfo.advance_greedily``. It stands for some twenty kernels that cost little but a start.

    Args:
        logits: floating [n, vocab_size], rows contiguous.
        tokens: int64 [n or more], written.
        views: the metadata by name; those of the first n sequences are written.
        idle: written in place of the token of a sequence that had stopped.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1, "the logits of a row stand side by side"
    _advance[(num_rows,)](
        logits,
        logits.stride(0),
        vocab_size,
        tokens,
        views["is_stopped"],
        views["stop_token_ids"],
        views["input_ids"],
        views["position_ids"],
        views["input_pos"],
        views["seq_len_with_cache"],
        views["cu_num_pages"],
        views["cache_loc"],
        IDLE=idle,
        NUM_STOPS=views["stop_token_ids"].shape[1],
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab_size)),
        num_warps=8,
    )


@triton.jit
def _advance(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    vocab_size,
    tokens,
    is_stopped,
    stop_token_ids,
    input_ids,
    position_ids,
    input_pos,
    seq_len_with_cache,
    cu_num_pages,
    cache_loc,
    IDLE: tl.constexpr,
    NUM_STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence."""
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    source = logits + row.to(tl.int64) * row_stride
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    has_nan = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab_size, BLOCK):
        index = start + lanes
        score = tl.load(source + index, mask=index < vocab_size, other=-float("inf")).to(tl.float32)
        has_nan |= (score != score).to(tl.int32)
        is_better = score > best
        best = tl.where(is_better, score, best)
        place = tl.where(is_better, index, place)
    largest = tl.max(best, 0)
    first = tl.min(tl.where(best == largest, place, vocab_size), 0)
    is_bad = (tl.max(has_nan, 0) > 0) | (tl.abs(largest) == float("inf"))
    sampled = tl.where(is_bad, -1, first).to(tl.int64)

    token = tl.where(tl.load(is_stopped + row) > 0, IDLE, sampled)
    tl.store(tokens + row, token)
    stops = tl.load(stop_token_ids + row * NUM_STOPS + tl.arange(0, NUM_STOPS))
    stop = (tl.max((stops == token).to(tl.int32), 0) > 0) | (token < 0)
    goes_on = tl.where(stop, 0, 1)
    tl.store(is_stopped + row, 1 - goes_on)
    tl.store(input_ids + row, token * goes_on)
    position = (tl.load(input_pos + row) + 1) * goes_on
    tl.store(input_pos + row, position)
    tl.store(position_ids + row, position.to(tl.int64))
    tl.store(seq_len_with_cache + row, position + 1)
    first_page = cache_loc + tl.load(cu_num_pages + row)
    tl.store(first_page, tl.load(first_page) * goes_on, mask=stop)
