"""The Triton kernel of ``tile_prefill``: prefill over pages, without a plan.

One program takes a tile of the new tokens of one sequence, for one query head, and walks over the keys that
they see with an online softmax in float32. Which sequence its tile is of, it finds in the prefix sums of the
lengths; there are as many programs as there can be tiles, and those beyond the last return. The tiles of a
sequence that see most begin first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ad_flashinfer_pass.kernels.overlap import await_turn


@triton.jit(
    do_not_specialize=["scale", "v_scale", "table_row", "num_sequences"],
    do_not_specialize_on_alignment=["bounds", "lengths", "block_table"],
)
def tile_prefill(  # type: ignore[no-untyped-def]
    query,
    kv_cache,
    bounds,
    lengths,
    block_table,
    sinks,
    slopes,
    out,
    scale,
    v_scale,
    query_token,
    query_head,
    cache_page,
    cache_kind,
    cache_head,
    cache_slot,
    table_row,
    num_sequences,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
    ONE_BYTE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Causal attention of a tile; the arguments are those of ``attention.tile_prefill.prefill``."""
    LOG2E: tl.constexpr = 1.4426950408889634
    await_turn(OVERLAPS)
    head, tile = tl.program_id(0), tl.program_id(1)
    sequences = tl.arange(0, SEQUENCES)
    is_one = sequences < num_sequences
    sizes = tl.load(bounds + sequences + 1, mask=is_one, other=0)
    sizes -= tl.load(bounds + sequences, mask=is_one, other=0)
    tiles = (sizes + QUERIES - 1) // QUERIES
    if tile >= tl.sum(tiles, axis=0):
        return
    seq = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    last = tl.sum(tl.where(sequences <= seq, tiles, 0), axis=0) - 1
    first_row = (last - tile) * QUERIES  # of its sequence
    first_token = tl.load(bounds + seq)
    num_tokens, length = tl.load(bounds + seq + 1) - first_token, tl.load(lengths + seq)
    past = length - num_tokens

    rows = first_row + tl.arange(0, QUERIES)
    row_mask = rows < num_tokens
    query_positions = past + rows
    dims, v_dims = tl.arange(0, HEAD_BLOCK), tl.arange(0, V_BLOCK)
    tokens = (first_token + rows).to(tl.int64)
    q = tl.load(
        query + tokens[:, None] * query_token + head * query_head + dims[None, :],
        mask=row_mask[:, None] & (dims[None, :] < HEAD_DIM),
        other=0.0,
    )
    factor = tl.full((QUERIES,), 1.0, tl.float32) * scale
    if ONE_BYTE:
        # As in ``split_decode``: an 8-bit number is exact in float16, to which it converts fastest.
        wide = q.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide), 1), 1e-30)
        q = (wide * (256.0 / largest)[:, None]).to(tl.float16)
        factor = factor * (largest / 256.0)
    if CAP is None:
        factor = factor * LOG2E
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + head).to(tl.float32) * LOG2E

    keys = kv_cache + head // GROUP * cache_head
    table = block_table + seq.to(tl.int64) * table_row
    top = tl.full((QUERIES,), -1e30, tl.float32)  # finite, for rows that see nothing of a block
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, V_BLOCK), tl.float32)
    end = (tl.minimum(length, past + first_row + QUERIES) + KEYS - 1) // KEYS
    begin = 0
    if WINDOW is not None:
        begin = tl.maximum(begin, past + first_row + 1 - WINDOW)
    if CHUNK is not None:
        begin = tl.maximum(begin, (past + first_row) // CHUNK * CHUNK)
    begin = begin // KEYS
    diagonal = begin
    if WINDOW is None and CHUNK is None:  # what all rows see needs no mask
        diagonal = (past + first_row + 1) // KEYS
        for block in range(begin, diagonal):
            top, total, sums = _block(
                top, total, sums, q, factor, slope, keys, cache_page, cache_kind, cache_slot, table, block,
                length, query_positions, dims, v_dims, HEAD_DIM, V_DIM, PAGE, KEYS, WINDOW, CHUNK, CAP,
                ONE_BYTE, slopes is not None, False,
            )  # fmt: skip
    for block in range(diagonal, end):
        top, total, sums = _block(
            top, total, sums, q, factor, slope, keys, cache_page, cache_kind, cache_slot, table, block,
            length, query_positions, dims, v_dims, HEAD_DIM, V_DIM, PAGE, KEYS, WINDOW, CHUNK, CAP,
            ONE_BYTE, slopes is not None, True,
        )  # fmt: skip

    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)  # so that neither overflows
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.exp2(sink - new_top)
        sums = sums * shrink[:, None]
    result = sums * (v_scale / tl.where(total > 0.0, total, 1.0))[:, None]
    places = (tokens * tl.num_programs(0) + head)[:, None] * V_DIM + v_dims[None, :]
    mask = row_mask[:, None] & (v_dims[None, :] < V_DIM)
    tl.store(out + places, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    top,
    total,
    sums,
    q,
    factor,
    slope,
    keys,
    cache_page,
    cache_kind,
    cache_slot,
    table,
    block,
    length,
    query_positions,
    dims,
    v_dims,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
    ONE_BYTE: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The softmax's largest logit, its sum and that of the values, with KEYS keys more."""
    LOG2E: tl.constexpr = 1.4426950408889634
    offsets = tl.arange(0, KEYS)
    positions = block * KEYS + offsets
    in_cache = positions < length
    if PAGE % KEYS == 0:
        page = tl.load(table + block * KEYS // PAGE).to(tl.int64)
        places = page * cache_page + (block * KEYS % PAGE + offsets) * cache_slot
    else:
        page = tl.load(table + positions // PAGE, mask=in_cache, other=0).to(tl.int64)
        places = page * cache_page + (positions % PAGE) * cache_slot
    k_mask, v_mask = dims[None, :] < HEAD_DIM, v_dims[None, :] < V_DIM
    if MASKED:
        k_mask, v_mask = in_cache[:, None] & k_mask, in_cache[:, None] & v_mask
    k = tl.load(keys + places[:, None] + dims[None, :], mask=k_mask, other=0.0)
    v = tl.load(keys + cache_kind + places[:, None] + v_dims[None, :], mask=v_mask, other=0.0)
    if ONE_BYTE:
        k, v = k.to(tl.float16), v.to(tl.float16)
    logits = tl.dot(q, tl.trans(k)) * factor[:, None]
    if CAP is not None:
        logits = CAP * LOG2E * (1.0 - 2.0 / (tl.exp(logits * (2.0 / CAP)) + 1.0))  # tanh
    if HAS_SLOPE:
        logits += slope * (positions[None, :] - query_positions[:, None]).to(tl.float32)
    if MASKED:
        visible = in_cache[None, :] & (positions[None, :] <= query_positions[:, None])
        if WINDOW is not None:
            visible = visible & (positions[None, :] > query_positions[:, None] - WINDOW)
        if CHUNK is not None:
            visible = visible & (positions[None, :] >= (query_positions // CHUNK * CHUNK)[:, None])
        logits = tl.where(visible, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp2(logits - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None])
    return new_top, total, sums
