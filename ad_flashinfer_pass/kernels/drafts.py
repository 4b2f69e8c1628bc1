"""The end of a step that verifies drafts, on the device: which are kept, and guesses for the next step.

The tokens of all places have been chosen (``kernels.sampling``). One program a sequence, in each launch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
"""Places of a text that a program looks at at once."""
_PAGES = 256
"""Of a sequence, that a program copies at once."""


def accept(
    num_rows: int,
    num_drafts: int,
    tokens: Tensor,
    views: Mapping[str, Tensor],
    *,
    max_seq_len: int,
    idle: int,
) -> None:
    """See ``SequenceInfo.accept``.

    Args:
        num_rows: of logits, 1 + num_drafts a sequence.
        num_drafts: of each sequence.
        tokens: int64 [num_rows or more], what was chosen; ``idle`` is written where it is not kept.
        views: the metadata by name; ``num_generated`` counts one token a row already.
        max_seq_len: positions lie below it.
        idle: negative.
    """
    _accept[(num_rows // (1 + num_drafts),)](
        tokens,
        views["input_ids"],
        views["position_ids"],
        views["sequence_lengths"],
        views["input_pos"],
        views["seq_len_with_cache"],
        views["max_cached"],
        views["is_stopped"],
        views["num_generated"],
        views["stop_token_ids"],
        views["cu_num_pages"],
        views["cache_loc"],
        max_seq_len,
        IDLE=idle,
        WIDTH=1 + num_drafts,
        LANES=triton.next_power_of_2(1 + num_drafts),
        NUM_STOPS=views["stop_token_ids"].shape[1],
        num_warps=1,
    )


def set_step(
    num_rows: int,
    width: int,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    got: Tensor | None,
    *,
    back: int,
    stride: int,
    max_seq_len: int,
) -> None:
    """See ``SequenceInfo.follow``, and, where there is ``got``, ``SequenceInfo.look_back``.

    Args:
        num_rows: sequences.
        width: tokens of each.
        ours: the metadata by name that are written: those of these rows.
        theirs: the metadata of the step that was run.
        got: int64 [num_rows, width], contiguous.
        back: places by which a row is read before its own, without ``got``.
        stride: tokens of each sequence in their step.
        max_seq_len: positions lie below it.
    """
    names = ("input_ids", "position_ids", "sequence_lengths", "token_gather_indices", "input_pos")
    more = ("seq_len_with_cache", "cu_seqlen", "is_stopped", "temperature", "stop_token_ids")
    pages = ("cu_num_pages", "cache_loc")
    with torch.cuda.device_of(ours["input_ids"]):
        _set_step[(num_rows,)](
            *(ours[name] for name in (*names, *more, *pages)),
            *(theirs[name] for name in ("input_ids", "input_pos", "is_stopped", *pages)),
            got,
            back,
            max_seq_len,
            STRIDE=stride,
            WIDTH=width,
            LANES=triton.next_power_of_2(width),
            NUM_STOPS=ours["stop_token_ids"].shape[1],
            BLOCK=_PAGES,
            num_warps=1,
        )


def match(
    texts: Tensor,
    drafts: Tensor,
    accepted: Tensor | None,
    slots: Tensor,
    input_pos: Tensor,
    *,
    most: int,
    least: int,
) -> None:
    """Write what ``ngram.guess`` guesses.

    Args:
        texts: int32 [num_slots, max_seq_len], the tokens of each sequence; what is accepted is written.
        drafts: int64 [rows, 1 + num_drafts], with the newest tokens; the others are written.
        accepted: see ``Drafter.propose``.
        slots: int64 [rows or more].
        input_pos: int32 [rows or more], the places of the newest tokens.
        most: tokens whose agreement counts.
        least: of them, for a guess.
    """
    num_rows, width = drafts.shape if accepted is None else accepted.shape
    with torch.cuda.device_of(texts):
        _match[(num_rows,)](
            texts,
            texts.stride(0),
            drafts,
            accepted,
            slots,
            input_pos,
            WIDTH=width,
            LANES=triton.next_power_of_2(width),
            BLOCK=min(_BLOCK, max(64, triton.next_power_of_2(texts.shape[1]))),
            MOST=most,
            LEAST=least,
            num_warps=8,
        )


@triton.jit(do_not_specialize=["max_seq_len"])
def _accept(  # type: ignore[no-untyped-def]
    tokens,
    input_ids,
    position_ids,
    sequence_lengths,
    input_pos,
    seq_len_with_cache,
    max_cached,
    is_stopped,
    num_generated,
    stop_token_ids,
    cu_num_pages,
    cache_loc,
    max_seq_len,
    IDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    NUM_STOPS: tl.constexpr,
):
    """The tokens that one sequence gets, and its metadata."""
    row = tl.program_id(0)
    places, first = tl.arange(0, LANES), row * WIDTH
    is_place = places < WIDTH
    chosen = tl.load(tokens + first + places, mask=is_place, other=IDLE)
    drafts = tl.load(input_ids + first + places + 1, mask=places < WIDTH - 1, other=-1)
    position = tl.load(input_pos + row)
    is_right = (chosen == drafts) & (position + places + 1 < tl.load(max_cached + row)) & (places < WIDTH - 1)
    num_right = tl.min(tl.where(is_right, WIDTH, places), 0)
    is_given = places <= num_right
    newest = tl.sum(tl.where(places == num_right, chosen, 0), 0)
    tl.store(tokens + first + places, tl.where(is_given, chosen, IDLE), mask=is_place)

    stops = tl.load(stop_token_ids + first * NUM_STOPS + tl.arange(0, NUM_STOPS))
    is_stop = (stops[None, :] == chosen[:, None]) & is_given[:, None]
    stopped = (tl.max(tl.max(is_stop.to(tl.int32), 1), 0) > 0) | (newest < 0)
    goes_on = tl.where(stopped, 0, 1)
    tl.store(is_stopped + first + places, tl.where(stopped, 1, 0) + places * 0, mask=is_place)
    generated = tl.load(num_generated + first + places, mask=is_place, other=0)
    tl.store(num_generated + first + places, generated + num_right, mask=is_place)
    tl.store(input_ids + first, newest * goes_on)
    position = (position + num_right + 1) * goes_on
    tl.store(input_pos + row, position)
    tl.store(seq_len_with_cache + row, position + WIDTH)
    positions = tl.minimum(position + places, max_seq_len - 1).to(tl.int64)
    tl.store(position_ids + first + places, positions, mask=is_place)
    tl.store(sequence_lengths + first + places, positions + 1, mask=is_place)
    first_page = cache_loc + tl.load(cu_num_pages + row)
    tl.store(first_page, tl.load(first_page) * goes_on, mask=stopped)


@triton.jit(do_not_specialize=["back", "max_seq_len"])
def _set_step(  # type: ignore[no-untyped-def]
    input_ids,
    position_ids,
    sequence_lengths,
    token_gather_indices,
    input_pos,
    seq_len_with_cache,
    cu_seqlen,
    is_stopped,
    temperature,
    stop_token_ids,
    cu_num_pages,
    cache_loc,
    their_ids,
    their_pos,
    their_is_stopped,
    their_cu_num_pages,
    their_cache_loc,
    got,
    back,
    max_seq_len,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    NUM_STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The metadata of one sequence."""
    row, places = tl.program_id(0), tl.arange(0, LANES)
    first, is_place = row * WIDTH, places < WIDTH
    position = tl.load(their_pos + row)
    if got is None:
        ids, last = tl.load(their_ids + row * STRIDE + places, mask=is_place, other=0), 0
        stopped = (tl.load(their_is_stopped + row * STRIDE) > 0) | (position + STRIDE >= max_seq_len)
        goes_on = tl.where(stopped, 0, 1)
    else:
        ids = tl.load(got + first + places, mask=is_place, other=-1)
        back = tl.maximum(tl.sum((ids >= 0).to(tl.int32), 0), 1)
        ids, last, goes_on = tl.maximum(ids, 0), back - 1, 1
    position = tl.maximum(position - back, 0) * goes_on
    positions = tl.minimum(position + places, max_seq_len - 1).to(tl.int64)
    tl.store(input_ids + first + places, ids, mask=is_place)
    tl.store(position_ids + first + places, positions, mask=is_place)
    tl.store(sequence_lengths + first + places, positions + 1, mask=is_place)
    tl.store(token_gather_indices + row, (first + last).to(tl.int64))
    tl.store(input_pos + row, position)
    tl.store(seq_len_with_cache + row, position + WIDTH)
    tl.store(cu_seqlen + row, first)
    tl.store(cu_seqlen + row + 1, first + WIDTH)
    tl.store(is_stopped + row, 1 - goes_on)
    tl.store(temperature + row, 0.0)
    stops = tl.arange(0, NUM_STOPS)
    tl.store(stop_token_ids + row * NUM_STOPS + stops, tl.full((NUM_STOPS,), -1, tl.int64))
    start, end = tl.load(their_cu_num_pages + row), tl.load(their_cu_num_pages + row + 1)
    tl.store(cu_num_pages + row, start)
    tl.store(cu_num_pages + row + 1, end)
    pages = tl.arange(0, BLOCK)
    for page in range(start, tl.maximum(end, start + 1), BLOCK):  # that of a row without pages is read, too
        mask = page + pages < tl.maximum(end, start + 1)
        location = tl.load(their_cache_loc + page + pages, mask=mask)
        location *= tl.where(page + pages == start, goes_on, 1)
        tl.store(cache_loc + page + pages, location, mask=mask)


@triton.jit(do_not_specialize=["text_stride"])
def _match(  # type: ignore[no-untyped-def]
    texts,
    text_stride,
    drafts,
    accepted,
    slots,
    input_pos,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
    LEAST: tl.constexpr,
):
    """The place of one text whose last tokens agree with its end, and what stands after it."""
    row = tl.program_id(0)
    text = texts + tl.load(slots + row) * text_stride
    last = tl.load(input_pos + row)
    lanes = tl.arange(0, LANES)
    if accepted is not None:
        got = tl.load(accepted + row * WIDTH + lanes, mask=lanes < WIDTH, other=-1)
        count = tl.sum((got >= 0).to(tl.int32), 0)
        place = last - count + 1 + lanes
        tl.store(text + place, got.to(tl.int32), mask=(got >= 0) & (place > 0))
        tl.debug_barrier()
    best = tl.zeros((), tl.int64)
    for start in range(0, last, BLOCK):
        places = start + tl.arange(0, BLOCK)
        agrees = places < last
        length = tl.zeros((BLOCK,), tl.int32)
        for back in tl.static_range(MOST):
            token = tl.where(last >= back, tl.load(text + tl.maximum(last - back, 0)), -1)
            there = tl.load(text + places - back, mask=agrees & (places >= back), other=-2)
            agrees = agrees & (there == token)
            length += agrees.to(tl.int32)
        best = tl.maximum(best, tl.max((length.to(tl.int64) << 32) | places.to(tl.int64), 0))
    found = (best & 0xFFFFFFFF).to(tl.int32)
    is_found = (best >> 32) >= LEAST
    after = found + 1 + (lanes - 1) % tl.maximum(last - found, 1)
    is_draft = (lanes > 0) & (lanes < WIDTH)
    newest = tl.load(text + last)  # a token that the model has seen; 0 may be one that it cannot read
    guess = tl.where(is_found, tl.load(text + after, mask=is_draft, other=0), newest)
    tl.store(drafts + row * WIDTH + lanes, guess.to(tl.int64), mask=is_draft)
