"""The Triton kernels of ``latent``: attention over rows that are K, and whose first part is V.

A row of the result is a query head of a token: a program takes ROWS of them, which read the same keys, and a
part of these. Each tile of the cache is read once, and is K in one product and V in another, with an online
softmax in float32. With several parts, each leaves its sums in a workspace, and a second kernel adds them,
always in the order of the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-1e30)
"""Below any logit, and finite for rows that see nothing."""


@triton.jit(
    do_not_specialize=["scale", "v_scale", "table_row", "splits", "num_seqs"],
    do_not_specialize_on_alignment=["cu_seqlen", "lengths", "block_table"],
)
def attend(  # type: ignore[no-untyped-def]
    query,
    kv_cache,
    cu_seqlen,
    lengths,
    block_table,
    sinks,
    out,
    sums_of_parts,
    stats_of_parts,
    tiles,
    scale,
    v_scale,
    cache_page,
    cache_slot,
    table_row,
    num_seqs,
    splits,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    REST: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SEQS: tl.constexpr,
    LEVELS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
    ONE_BYTE: tl.constexpr,
):
    """The new tokens of sequences over their pages; the arguments are those of ``attention.latent``."""
    LOG2E: tl.constexpr = 1.4426950408889634
    WIDTH: tl.constexpr = RANK + REST
    tile, part = tl.program_id(0), tl.program_id(1)
    if SEQS == 0:  # one token of each sequence
        seq, token, new = tile // tl.cdiv(HEADS, ROWS), tile // tl.cdiv(HEADS, ROWS), 1
        first = tile % tl.cdiv(HEADS, ROWS) * ROWS
    else:
        every = tl.arange(0, SEQS)
        begins = tl.load(cu_seqlen + every, mask=every < num_seqs, other=0)
        ends = tl.load(cu_seqlen + every + 1, mask=every < num_seqs, other=0)
        needed = tl.cdiv((ends - begins) * HEADS, ROWS)
        if tile >= tl.sum(needed, 0):
            if tiles is not None and part == 0:
                tl.store(tiles + 3 * tile, 0)
            return
        seq = 0  # halving: the first sequence with whose tiles there are more than this one's number
        for half in tl.static_range(LEVELS):
            past = seq + (SEQS >> (half + 1))
            seq = tl.where(tl.sum(tl.where(every < past, needed, 0), 0) <= tile, past, seq)
        token = tl.load(cu_seqlen + seq)
        new = tl.load(cu_seqlen + seq + 1) - token
        first = (tile - tl.sum(tl.where(every < seq, needed, 0), 0)) * ROWS
    length = tl.load(lengths + seq)
    num_rows = tl.minimum(new * HEADS - first, ROWS)
    rows = tl.arange(0, ROWS)
    row_mask = rows < num_rows
    seen = length - new + (first + rows) // HEADS  # position of each row's token, the last key that it sees
    last = length - new + (first + num_rows - 1) // HEADS
    first_key = 0
    lowest = length - new + first // HEADS
    if WINDOW is not None:
        first_key = tl.maximum(first_key, lowest - WINDOW + 1)
    if CHUNK is not None:
        first_key = tl.maximum(first_key, lowest // CHUNK * CHUNK)
    # Whole blocks, shared out as evenly as they come; no part is empty, short sequences have fewer parts.
    first_block = first_key // BLOCK
    num_blocks = last // BLOCK + 1 - first_block
    parts = tl.minimum(splits, num_blocks)
    if part >= parts:
        return
    begin = first_block + part * num_blocks // parts
    end = first_block + (part + 1) * num_blocks // parts

    dims, rest = tl.arange(0, RANK_BLOCK), tl.arange(0, REST_BLOCK)
    place = (token * HEADS + first).to(tl.int64)
    q_rows = query + (place + rows)[:, None] * WIDTH
    q = tl.load(q_rows + dims[None, :], mask=row_mask[:, None] & (dims[None, :] < RANK), other=0.0)
    factor = tl.full((ROWS,), 1.0, tl.float32) * scale
    if REST > 0:
        q_rest = tl.load(
            q_rows + RANK + rest[None, :], mask=row_mask[:, None] & (rest[None, :] < REST), other=0.0
        )
    if ONE_BYTE:
        # An 8-bit number is exact in float16, to which it converts fastest. So does the query, once its
        # largest element is 256.
        largest = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 1e-30)
        if REST > 0:
            largest = tl.maximum(largest, tl.max(tl.abs(q_rest.to(tl.float32)), 1))
            q_rest = (q_rest.to(tl.float32) * (256.0 / largest)[:, None]).to(tl.float16)
        q = (q.to(tl.float32) * (256.0 / largest)[:, None]).to(tl.float16)
        factor = factor * (largest / 256.0)
    if CAP is None:
        factor = factor * LOG2E

    table = block_table + seq.to(tl.int64) * table_row
    offsets = tl.arange(0, BLOCK)
    top = tl.full((ROWS,), _LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    weights, shrink = tl.zeros((ROWS, BLOCK), q.dtype), top
    for block in range(begin, end):
        positions = block * BLOCK + offsets
        if PAGE % BLOCK == 0:
            page = tl.load(table + block * BLOCK // PAGE).to(tl.int64)
            places = page * cache_page + (block * BLOCK % PAGE + offsets) * cache_slot
        else:
            page = tl.load(table + positions // PAGE, mask=positions <= last, other=0).to(tl.int64)
            places = page * cache_page + (positions % PAGE) * cache_slot
        in_cache = (positions <= last)[:, None]
        c_mask = in_cache if RANK == RANK_BLOCK else in_cache & (dims[None, :] < RANK)
        c = tl.load(kv_cache + places[:, None] + dims[None, :], mask=c_mask, other=0.0)
        if ONE_BYTE:
            c = c.to(tl.float16)
        if REST > 0:
            rest_mask = in_cache if REST == REST_BLOCK else in_cache & (rest[None, :] < REST)
            k_rest = tl.load(kv_cache + RANK + places[:, None] + rest[None, :], mask=rest_mask, other=0.0)
            if ONE_BYTE:
                k_rest = k_rest.to(tl.float16)
        if ROWS >= 64:
            # Always so. Of a product that leads to another, Triton lets each half of the warps compute all,
            # but it does not see one behind a branch.
            if block >= begin:
                logits = tl.zeros((ROWS, BLOCK), tl.float32)
                if REST > 0:  # noqa: SIM102
                    if splits > 0:
                        logits = tl.dot(q_rest, tl.trans(k_rest), logits)
                logits = tl.dot(q, tl.trans(c), logits) * factor[:, None]
                weights, shrink, top, total = _weigh(
                    logits, positions, seen, top, total, c.dtype, WINDOW, CHUNK, CAP
                )
        else:
            logits = tl.dot(q, tl.trans(c))
            if REST > 0:
                logits = tl.dot(q_rest, tl.trans(k_rest), logits)
            logits = logits * factor[:, None]
            weights, shrink, top, total = _weigh(
                logits, positions, seen, top, total, c.dtype, WINDOW, CHUNK, CAP
            )
        sums = tl.dot(weights, c, sums * shrink[:, None])

    mask = row_mask[:, None] & (dims[None, :] < RANK)
    if tiles is not None and part == 0:
        tl.store(tiles + 3 * tile, parts)
        tl.store(tiles + 3 * tile + 1, token * HEADS + first)
        tl.store(tiles + 3 * tile + 2, num_rows)
    if parts == 1:
        if sinks is not None:
            sink = _sink(sinks, (first + rows) % HEADS, row_mask)
            new_top = tl.maximum(top, sink)
            total = total * tl.exp2(top - new_top) + tl.exp2(sink - new_top)
            sums = sums * tl.exp2(top - new_top)[:, None]
        result = sums * (v_scale / tl.where(total > 0.0, total, 1.0))[:, None]
        tl.store(
            out + (place + rows)[:, None] * RANK + dims[None, :], result.to(out.dtype.element_ty), mask=mask
        )
    else:
        row = (tile * splits + part) * ROWS + rows
        tl.store(sums_of_parts + row.to(tl.int64)[:, None] * RANK + dims[None, :], sums, mask=mask)
        tl.store(stats_of_parts + 2 * row, top, mask=row_mask)
        tl.store(stats_of_parts + 2 * row + 1, total, mask=row_mask)


@triton.jit
def _weigh(  # type: ignore[no-untyped-def]
    logits,
    positions,
    seen,
    top,
    total,
    dtype: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
):
    """A block of the online softmax: weights, what the sums before shrink by, the new maximum and total."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if CAP is not None:
        logits = CAP * LOG2E * (1.0 - 2.0 / (tl.exp(logits * (2.0 / CAP)) + 1.0))  # tanh
    visible = positions[None, :] <= seen[:, None]
    if WINDOW is not None:
        visible = visible & (positions[None, :] > seen[:, None] - WINDOW)
    if CHUNK is not None:
        visible = visible & (positions[None, :] // CHUNK == seen[:, None] // CHUNK)
    logits = tl.where(visible, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp2(logits - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    return weights.to(dtype), shrink, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["v_scale", "splits"])
def add_parts(  # type: ignore[no-untyped-def]
    sinks,
    out,
    sums_of_parts,
    stats_of_parts,
    tiles,
    v_scale,
    splits,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """What the parts of one row left, added in their order and stored, COLUMNS of it a program."""
    tile, row = tl.program_id(0), tl.program_id(1)
    parts = tl.load(tiles + 3 * tile)
    if (parts < 2) | (row >= tl.load(tiles + 3 * tile + 2)):
        return
    place = tl.load(tiles + 3 * tile + 1) + row
    dims, some = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PARTS)
    top = tl.full((), _LOWEST, tl.float32)
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, parts, PARTS):
        live = first + some < parts
        at = (tile * splits + first + some) * ROWS + row
        part_top = tl.load(stats_of_parts + 2 * at, mask=live, other=_LOWEST)
        part_total = tl.load(stats_of_parts + 2 * at + 1, mask=live, other=0.0)
        part = tl.load(
            sums_of_parts + at.to(tl.int64)[:, None] * RANK + dims[None, :],
            mask=live[:, None] & (dims[None, :] < RANK),
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(part_top, 0))
        shrink, share = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
        total = total * shrink + tl.sum(part_total * share, 0)
        sums = sums * shrink + tl.sum(part * share[:, None], 0)
        top = new_top
    if sinks is not None:
        sink = _sink(sinks, place % HEADS, True)
        new_top = tl.maximum(top, sink)
        total = total * tl.exp2(top - new_top) + tl.exp2(sink - new_top)
        sums = sums * tl.exp2(top - new_top)
    result = sums * (v_scale / tl.where(total > 0.0, total, 1.0))
    tl.store(out + place.to(tl.int64) * RANK + dims, result.to(out.dtype.element_ty), mask=dims < RANK)


@triton.jit
def _sink(sinks, heads, mask):  # type: ignore[no-untyped-def]
    """The sinks of heads, as logits in base 2."""
    return tl.load(sinks + heads, mask=mask, other=0.0).to(tl.float32) * 1.4426950408889634
