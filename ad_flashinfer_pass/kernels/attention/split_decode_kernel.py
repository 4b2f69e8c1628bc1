"""The Triton kernel of ``split_decode``: decode over pages, the keys split among programs, in one launch.

One program takes the query heads of one KV head, of each new token of a sequence, and a part of the
sequence's keys, and walks over them with an online softmax in float32. With more than one part, each
program leaves its sums in a workspace and the last to arrive adds them, always in the order of the keys:
the result does not depend on who was last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ad_flashinfer_pass.kernels.overlap import await_turn


@triton.jit(
    do_not_specialize=["scale", "v_scale", "table_row", "splits"],
    do_not_specialize_on_alignment=["lengths", "block_table"],
)
def split_decode(  # type: ignore[no-untyped-def]
    query,
    kv_cache,
    lengths,
    block_table,
    sinks,
    slopes,
    out,
    sums_of_parts,
    stats_of_parts,
    arrivals,
    scale,
    v_scale,
    query_token,
    query_head,
    cache_page,
    cache_kind,
    cache_head,
    cache_slot,
    table_row,
    splits,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
    ONE_BYTE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Attention of ``QUERIES`` new tokens a sequence; the arguments are those of ``split_decode.decode``."""
    LOG2E: tl.constexpr = 1.4426950408889634
    await_turn(OVERLAPS)
    head, part, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + seq)
    rows = tl.arange(0, GROUP_ROWS)
    row_mask = rows < QUERIES * GROUP
    if QUERIES == 1:
        heads, tokens, end_keys = head * GROUP + rows, seq + rows * 0, length + rows * 0
    else:
        heads, tokens = head * GROUP + rows % GROUP, seq * QUERIES + rows // GROUP
        end_keys = length - (QUERIES - 1) + rows // GROUP
    first_keys, first_key = end_keys * 0, 0
    if WINDOW is not None:
        first_keys = tl.maximum(first_keys, end_keys - WINDOW)
        first_key = tl.maximum(first_key, length - (QUERIES - 1) - WINDOW)
    if CHUNK is not None:
        first_keys = tl.maximum(first_keys, (end_keys - 1) // CHUNK * CHUNK)
        first_key = tl.maximum(first_key, (length - QUERIES) // CHUNK * CHUNK)
    # Whole blocks, shared out as evenly as they come; no part is empty, short sequences have fewer parts.
    first_block = first_key // BLOCK
    num_blocks = (length + BLOCK - 1) // BLOCK - first_block
    parts = tl.minimum(splits, tl.maximum(num_blocks, 1))
    if part >= parts:
        return
    begin = first_block + part * num_blocks // parts
    end = first_block + (part + 1) * num_blocks // parts

    dims, v_dims = tl.arange(0, HEAD_BLOCK), tl.arange(0, V_BLOCK)
    q = tl.load(
        query + tokens.to(tl.int64)[:, None] * query_token + heads[:, None] * query_head + dims[None, :],
        mask=row_mask[:, None] & (dims[None, :] < HEAD_DIM),
        other=0.0,
    )
    factor = tl.full((GROUP_ROWS,), 1.0, tl.float32) * scale
    if ONE_BYTE:
        # An 8-bit number is exact in float16, to which it converts fastest. So does the query, once its
        # largest element is 256.
        wide = q.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide), 1), 1e-30)
        q = (wide * (256.0 / largest)[:, None]).to(tl.float16)
        factor = factor * (largest / 256.0)
    if CAP is None:
        factor = factor * LOG2E
    if slopes is not None:
        slope = tl.load(slopes + heads, mask=row_mask, other=0.0).to(tl.float32) * LOG2E

    keys = kv_cache + head * cache_head
    values = keys + cache_kind
    table = block_table + seq.to(tl.int64) * table_row
    offsets = tl.arange(0, BLOCK)
    top = tl.full(
        (GROUP_ROWS,), -1e30, tl.float32
    )  # below any logit, and finite for rows that see no key here
    total = tl.zeros((GROUP_ROWS,), tl.float32)
    sums = tl.zeros((GROUP_ROWS, V_BLOCK), tl.float32)
    for block in range(begin, end):
        positions = block * BLOCK + offsets
        if PAGE % BLOCK == 0:
            page = tl.load(table + block * BLOCK // PAGE).to(tl.int64)
            places = page * cache_page + (block * BLOCK % PAGE + offsets) * cache_slot
        else:
            page = tl.load(table + positions // PAGE, mask=positions < length, other=0).to(tl.int64)
            places = page * cache_page + (positions % PAGE) * cache_slot
        in_cache = positions < length
        k = tl.load(
            keys + places[:, None] + dims[None, :],
            mask=in_cache[:, None] & (dims[None, :] < HEAD_DIM),
            other=0.0,
        )
        v = tl.load(
            values + places[:, None] + v_dims[None, :],
            mask=in_cache[:, None] & (v_dims[None, :] < V_DIM),
            other=0.0,
        )
        if ONE_BYTE:
            k, v = k.to(tl.float16), v.to(tl.float16)
        logits = tl.dot(q, tl.trans(k)) * factor[:, None]
        if CAP is not None:
            logits = CAP * LOG2E * (1.0 - 2.0 / (tl.exp(logits * (2.0 / CAP)) + 1.0))  # tanh
        if slopes is not None:
            logits += slope[:, None] * (positions[None, :] - end_keys[:, None] + 1).to(tl.float32)
        if QUERIES == 1:
            visible = in_cache
            if WINDOW is not None or CHUNK is not None:
                visible = visible & (positions >= first_key)
            logits = tl.where(visible[None, :], logits, float("-inf"))
        else:
            visible = positions[None, :] < end_keys[:, None]
            if WINDOW is not None or CHUNK is not None:
                visible = visible & (positions[None, :] >= first_keys[:, None])
            logits = tl.where(visible, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None])
        top = new_top

    if parts == 1:
        rows_out = tokens.to(tl.int64) * tl.num_programs(0) * GROUP + heads
        _finish(out, sinks, heads, rows_out, row_mask, sums, top, total, v_scale, V_DIM, v_dims)
    else:
        pair = seq * tl.num_programs(0) + head
        row = (pair * splits + part) * QUERIES * GROUP + rows
        mask = row_mask[:, None] & (v_dims[None, :] < V_DIM)
        tl.store(sums_of_parts + row[:, None] * V_DIM + v_dims[None, :], sums, mask=mask)
        tl.store(stats_of_parts + 2 * row, top, mask=row_mask)
        tl.store(stats_of_parts + 2 * row + 1, total, mask=row_mask)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + pair, 1) == parts - 1:
            tl.store(arrivals + pair, 0)
            _add_parts(
                out,
                sinks,
                sums_of_parts + pair * splits * QUERIES * GROUP * V_DIM,
                stats_of_parts + 2 * pair * splits * QUERIES * GROUP,
                head,
                seq,
                parts,
                v_scale,
                QUERIES,
                GROUP,
                V_DIM,
                V_BLOCK,
            )


@triton.jit
def _add_parts(  # type: ignore[no-untyped-def]
    out,
    sinks,
    sums_of_parts,
    stats_of_parts,
    head,
    seq,
    parts,
    v_scale,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
):
    """What the parts of one sequence and KV head left, added in their order and stored."""
    ROWS: tl.constexpr = triton.next_power_of_2(QUERIES * GROUP)
    rows, v_dims = tl.arange(0, ROWS), tl.arange(0, V_BLOCK)
    top = tl.full((ROWS,), -1e30, tl.float32)  # below any logit, and finite for rows that do not exist
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, V_BLOCK), tl.float32)
    for first in range(0, parts, 8):
        for i in tl.static_range(8):  # unrolled, so that eight parts are read at once
            live = rows < tl.where(first + i < parts, QUERIES * GROUP, 0)
            row = (first + i) * QUERIES * GROUP + rows
            part_top = tl.load(stats_of_parts + 2 * row, mask=live, other=-1e30, cache_modifier=".cg")
            part_total = tl.load(stats_of_parts + 2 * row + 1, mask=live, other=0.0, cache_modifier=".cg")
            part = tl.load(
                sums_of_parts + row[:, None] * V_DIM + v_dims[None, :],
                mask=live[:, None] & (v_dims[None, :] < V_DIM),
                other=0.0,
                cache_modifier=".cg",
            )
            new_top = tl.maximum(top, part_top)
            shrink, share = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
            total = total * shrink + part_total * share
            sums = sums * shrink[:, None] + part * share[:, None]
            top = new_top
    heads = head * GROUP + rows % GROUP
    rows_out = (seq * QUERIES + rows // GROUP).to(tl.int64) * tl.num_programs(0) * GROUP + heads
    row_mask = rows < QUERIES * GROUP
    _finish(out, sinks, heads, rows_out, row_mask, sums, top, total, v_scale, V_DIM, v_dims)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    out,
    sinks,
    heads,
    rows_out,
    row_mask,
    sums,
    top,
    total,
    v_scale,
    V_DIM: tl.constexpr,
    v_dims,
):
    """Divide by the softmax's sum and store; a row that saw nothing is zero."""
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=row_mask, other=0.0).to(tl.float32) * 1.4426950408889634
        # Relative to the larger of both, so that neither overflows.
        new_top = tl.maximum(top, sink)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.exp2(sink - new_top)
        sums = sums * shrink[:, None]
    result = sums * (v_scale / tl.where(total > 0.0, total, 1.0))[:, None]
    tl.store(
        out + rows_out[:, None] * V_DIM + v_dims[None, :],
        result.to(out.dtype.element_ty),
        mask=row_mask[:, None] & (v_dims[None, :] < V_DIM),
    )
