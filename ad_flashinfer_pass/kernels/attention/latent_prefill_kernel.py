"""The Triton kernels of ``latent_prefill``: K and V of each head are expanded, and attended over.

``gather`` takes the rows of the keys that are expanded from the pages, one sequence after the other,
``expand`` multiplies them by W_UK and W_UV, ``attend`` is causal attention over the result. ``attend_past``
has the keys before those, over the latent, and adds the two by their sums of exponentials.

Which keys are expanded is read on the device, in each kernel anew: see ``_shares``.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-1e30)
"""Below any logit, and finite for rows that see nothing."""
PAD = 128
"""Rows of zeros behind the last, so that blocks of keys need no mask."""
_PAD = tl.constexpr(PAD)


@triton.jit
def _shares(  # type: ignore[no-untyped-def]
    bounds, lengths, num_seqs, extra, SEQUENCES: tl.constexpr, LEAST: tl.constexpr
):
    """Of each sequence: new tokens, keys that are not expanded, and those after them, which are.

    All new tokens are, and of the past the last ones, where there are at least LEAST new tokens, until extra
    keys are given away.
    """
    each = tl.arange(0, SEQUENCES)
    is_one = each < num_seqs
    new = tl.load(bounds + each + 1, mask=is_one, other=0) - tl.load(bounds + each, mask=is_one, other=0)
    past = tl.load(lengths + each, mask=is_one, other=0) - new
    wanted = tl.where(new >= LEAST, past, 0)
    left = extra - (tl.cumsum(wanted, 0) - wanted)
    given = tl.maximum(tl.minimum(wanted, left), 0)
    return new, past - given, given + new


@triton.jit
def _of(sequences, seq, values):  # type: ignore[no-untyped-def]
    """The value of one sequence."""
    return tl.sum(tl.where(sequences == seq, values, 0), 0)


@triton.jit(
    do_not_specialize=["table_row", "num_seqs", "extra"],
    do_not_specialize_on_alignment=["bounds", "lengths", "block_table"],
)
def gather(  # type: ignore[no-untyped-def]
    kv_cache,
    bounds,
    lengths,
    block_table,
    out,
    cache_page,
    cache_slot,
    table_row,
    num_seqs,
    extra,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The rows of the keys that are expanded, in the dtype of ``out``, and PAD rows of zeros."""
    _, firsts, keys = _shares(bounds, lengths, num_seqs, extra, SEQUENCES, LEAST)
    sequences = tl.arange(0, SEQUENCES)
    ends = tl.cumsum(keys, 0)
    total = tl.sum(keys, 0)
    if tl.program_id(0) * ROWS >= total + _PAD:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    seq = tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), 1)
    shift = tl.sum(tl.where(sequences[None, :] == seq[:, None], (firsts + keys - ends)[None, :], 0), 1)
    is_key = row < total
    position = row + shift
    pages = block_table + seq.to(tl.int64) * table_row + position // PAGE
    place = tl.load(pages, mask=is_key, other=0).to(tl.int64) * cache_page + position % PAGE * cache_slot
    for first in tl.static_range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        mask = is_key[:, None] & (column < WIDTH)
        found = tl.load(kv_cache + place[:, None] + column, mask=mask, other=0.0)
        at = out + row.to(tl.int64)[:, None] * WIDTH + column
        tl.store(at, found.to(out.dtype.element_ty), mask=(row < total + _PAD)[:, None] & (column < WIDTH))


@triton.jit(
    do_not_specialize=["num_seqs", "extra", "room"], do_not_specialize_on_alignment=["bounds", "lengths"]
)
def expand(  # type: ignore[no-untyped-def]
    rows,
    weight,
    bounds,
    lengths,
    out,
    weight_head,
    weight_row,
    weight_column,
    num_seqs,
    extra,
    room,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    SEQUENCES: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """weight [heads, SIZE, RANK] of the rows that ``gather`` wrote: [heads, room, SIZE]."""
    _, _, keys = _shares(bounds, lengths, num_seqs, extra, SEQUENCES, LEAST)
    total = tl.sum(keys, 0) + _PAD
    column, depth = tl.arange(0, SIZE_BLOCK), tl.arange(0, DEPTH)
    column_mask = (column < SIZE)[None, :]
    for item in range(tl.program_id(0), tl.cdiv(total, ROWS) * HEADS, tl.num_programs(0)):
        head, row = item % HEADS, item // HEADS * ROWS + tl.arange(0, ROWS)
        row_mask = (row < total)[:, None]
        of_rows = rows + row.to(tl.int64)[:, None] * WIDTH
        of_head = weight + head * weight_head + column[None, :] * weight_row
        sums = tl.zeros((ROWS, SIZE_BLOCK), tl.float32)
        for first in range(0, RANK, DEPTH):
            at = first + depth
            values = tl.load(of_rows + at[None, :], mask=row_mask & (at < RANK)[None, :], other=0.0)
            mask = (at < RANK)[:, None] & column_mask
            factors = tl.load(of_head + at[:, None] * weight_column, mask=mask, other=0.0)
            sums = tl.dot(values, factors, sums)
        place = (room * head + row.to(tl.int64))[:, None] * SIZE + column[None, :]
        tl.store(out + place, sums.to(out.dtype.element_ty), mask=row_mask & column_mask)


@triton.jit(
    do_not_specialize=["scale", "v_scale", "num_seqs", "extra", "room"],
    do_not_specialize_on_alignment=["bounds", "lengths"],
)
def attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    rows,
    values,
    bounds,
    lengths,
    out,
    stats,
    scale,
    v_scale,
    query_token,
    query_head,
    num_seqs,
    extra,
    room,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    NOPE: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    SEQUENCES: tl.constexpr,
    LEAST: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Causal attention of some new tokens of a sequence, for one head, over the keys that are expanded.

    Where there are others, ``stats`` gets the logarithm, to base 2, of each row's sum of exponentials.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    REST: tl.constexpr = WIDTH - RANK
    head, tile = tl.program_id(0), tl.program_id(1)
    new, firsts, shares = _shares(bounds, lengths, num_seqs, extra, SEQUENCES, LEAST)
    sequences = tl.arange(0, SEQUENCES)
    tiles = (new + QUERIES - 1) // QUERIES
    ends = tl.cumsum(tiles, 0)
    if tile >= tl.sum(tiles, 0):
        return
    seq = tl.sum((ends <= tile).to(tl.int32), 0)
    first_row = (_of(sequences, seq, ends) - 1 - tile) * QUERIES  # those that see most begin first
    num_tokens, num_keys = _of(sequences, seq, new), _of(sequences, seq, shares)
    begin = _of(sequences, seq, tl.cumsum(shares, 0)) - num_keys
    past = num_keys - num_tokens  # as far as it is expanded
    first_token = tl.load(bounds + seq)

    row = first_row + tl.arange(0, QUERIES)
    row_mask = row < num_tokens
    token = (first_token + row).to(tl.int64)
    dims, rest, columns = tl.arange(0, NOPE_BLOCK), tl.arange(0, REST_BLOCK), tl.arange(0, SIZE_BLOCK)
    q_rows = query + token[:, None] * query_token + head * query_head
    q = tl.load(q_rows + dims[None, :], mask=row_mask[:, None] & (dims[None, :] < NOPE), other=0.0)
    q_rest = q
    if REST > 0:
        q_rest = tl.load(
            q_rows + NOPE + rest[None, :], mask=row_mask[:, None] & (rest[None, :] < REST), other=0.0
        )
    factor = scale * LOG2E
    keys += (head.to(tl.int64) * room + begin) * NOPE
    values += (head.to(tl.int64) * room + begin) * SIZE
    rows += begin.to(tl.int64) * WIDTH + RANK
    top = tl.full((QUERIES,), _LOWEST, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, SIZE_BLOCK), tl.float32)
    diagonal = (past + first_row + 1) // KEYS  # all rows see the blocks before
    for block in range(0, diagonal):
        top, total, sums = _block(
            top, total, sums, q, q_rest, factor, keys, rows, values, block, past + row,
            WIDTH, NOPE, NOPE_BLOCK, REST, REST_BLOCK, SIZE, SIZE_BLOCK, KEYS, False,
        )  # fmt: skip
    for block in range(diagonal, (tl.minimum(num_keys, past + first_row + QUERIES) + KEYS - 1) // KEYS):
        top, total, sums = _block(
            top, total, sums, q, q_rest, factor, keys, rows, values, block, past + row,
            WIDTH, NOPE, NOPE_BLOCK, REST, REST_BLOCK, SIZE, SIZE_BLOCK, KEYS, True,
        )  # fmt: skip
    place = token * tl.num_programs(0) + head
    if _of(sequences, seq, firsts) > 0:
        tl.store(stats + place, top + tl.log2(total), mask=row_mask)
    result = sums * (v_scale / total)[:, None]
    mask = row_mask[:, None] & (columns[None, :] < SIZE)
    tl.store(out + place[:, None] * SIZE + columns[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    top,
    total,
    sums,
    q,
    q_rest,
    factor,
    keys,
    rows,
    values,
    block,
    last,
    WIDTH: tl.constexpr,
    NOPE: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    REST: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The softmax's largest logit, its sum and that of the values, with KEYS keys more."""
    key = block * KEYS + tl.arange(0, KEYS)
    dims, rest, columns = tl.arange(0, NOPE_BLOCK), tl.arange(0, REST_BLOCK), tl.arange(0, SIZE_BLOCK)
    at = key.to(tl.int64)[:, None]
    if NOPE == NOPE_BLOCK:
        k = tl.load(keys + at * NOPE + dims[None, :])
    else:
        k = tl.load(keys + at * NOPE + dims[None, :], mask=dims[None, :] < NOPE, other=0.0)
    if SIZE == SIZE_BLOCK:
        v = tl.load(values + at * SIZE + columns[None, :])
    else:
        v = tl.load(values + at * SIZE + columns[None, :], mask=columns[None, :] < SIZE, other=0.0)
    logits = tl.dot(q, tl.trans(k))
    if REST > 0:
        if REST == REST_BLOCK:
            k_rest = tl.load(rows + at * WIDTH + rest[None, :])
        else:
            k_rest = tl.load(rows + at * WIDTH + rest[None, :], mask=rest[None, :] < REST, other=0.0)
        logits = tl.dot(q_rest, tl.trans(k_rest), logits)
    logits = logits * factor
    if MASKED:
        logits = tl.where(key[None, :] <= last[:, None], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp2(logits - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None])
    return new_top, total, sums


@triton.jit(
    do_not_specialize=["scale", "v_scale", "table_row", "num_seqs", "extra"],
    do_not_specialize_on_alignment=["bounds", "lengths", "block_table"],
)
def attend_past(  # type: ignore[no-untyped-def]
    query,
    kv_cache,
    key_up,
    value_up,
    bounds,
    lengths,
    block_table,
    out,
    stats,
    scratch,
    sums_of_parts,
    stats_of_parts,
    scale,
    v_scale,
    query_token,
    query_head,
    cache_page,
    cache_slot,
    table_row,
    key_head,
    key_row,
    key_column,
    value_head,
    value_row,
    value_column,
    num_seqs,
    extra,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    NOPE: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    LEAST: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """What ``attend`` left, with the keys that were not expanded, over which the latent is attended.

    A tile is some new tokens of a sequence and one head, whose weights are absorbed here: where all keys are
    expanded, nothing is computed. Each program has every so manieth tile; if there are fewer tiles than
    programs, several share the keys of one, and leave what they have for ``add_parts``.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    REST: tl.constexpr = WIDTH - RANK
    new, firsts, _ = _shares(bounds, lengths, num_seqs, extra, SEQUENCES, LEAST)
    sequences = tl.arange(0, SEQUENCES)
    parts, ends = _parts(new, firsts, tl.num_programs(0), HEADS, QUERIES, KEYS)
    dims, rest, depth = tl.arange(0, RANK_BLOCK), tl.arange(0, REST_BLOCK), tl.arange(0, DEPTH)
    nopes, columns = tl.arange(0, NOPE_BLOCK), tl.arange(0, SIZE_BLOCK)
    for item in range(tl.program_id(0), tl.max(ends, 0) * HEADS, tl.num_programs(0)):
        head = item % HEADS
        seq, number, num_parts = _item(item // HEADS, parts, ends, SEQUENCES)
        first_row, part = number // num_parts * QUERIES, number % num_parts
        num_keys = _of(sequences, seq, firsts)
        num_blocks = (num_keys + KEYS - 1) // KEYS
        row = first_row + tl.arange(0, QUERIES)
        row_mask = row < _of(sequences, seq, new)
        token = (tl.load(bounds + seq) + row).to(tl.int64)
        q_rows = query + token[:, None] * query_token + head * query_head

        # By way of memory, so that the products have it from there: a result would stay in registers.
        own = scratch + (tl.program_id(0) * QUERIES + tl.arange(0, QUERIES))[:, None] * RANK
        x = tl.load(q_rows + nopes[None, :], mask=row_mask[:, None] & (nopes < NOPE)[None, :], other=0.0)
        for first in tl.range(0, RANK, DEPTH, num_stages=1):
            at = first + depth
            weight = tl.load(
                key_up + head * key_head + nopes[:, None] * key_row + at[None, :] * key_column,
                mask=(nopes < NOPE)[:, None] & (at < RANK)[None, :],
                other=0.0,
            )
            absorbed = tl.dot(x, weight).to(query.dtype.element_ty)
            tl.store(own + at[None, :], absorbed, mask=(at < RANK)[None, :])
        tl.debug_barrier()
        q = tl.load(own + dims[None, :], mask=(dims < RANK)[None, :], other=0.0)
        if REST > 0:
            q_rest = tl.load(
                q_rows + NOPE + rest[None, :], mask=row_mask[:, None] & (rest[None, :] < REST), other=0.0
            )

        table = block_table + seq.to(tl.int64) * table_row
        offsets = tl.arange(0, KEYS)
        top = tl.full((QUERIES,), _LOWEST, tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        sums = tl.zeros((QUERIES, RANK_BLOCK), tl.float32)
        # Of no constant, for which shared memory would be kept from the start to the end.
        weights, shrink = tl.zeros((QUERIES, KEYS), q.dtype) + num_keys.to(q.dtype), top
        for block in range(part * num_blocks // num_parts, (part + 1) * num_blocks // num_parts):
            key = block * KEYS + offsets
            is_key = key < num_keys
            if PAGE % KEYS == 0:
                page = tl.load(table + block * KEYS // PAGE).to(tl.int64)
                places = page * cache_page + (block * KEYS % PAGE + offsets) * cache_slot
            else:
                page = tl.load(table + key // PAGE, mask=is_key, other=0).to(tl.int64)
                places = page * cache_page + key % PAGE * cache_slot
            c_mask = is_key[:, None] if RANK == RANK_BLOCK else is_key[:, None] & (dims < RANK)[None, :]
            c = tl.load(kv_cache + places[:, None] + dims[None, :], mask=c_mask, other=0.0).to(q.dtype)
            if REST > 0:
                rest_mask = is_key[:, None] & (rest < REST)[None, :]
                k_rest = tl.load(kv_cache + RANK + places[:, None] + rest[None, :], mask=rest_mask, other=0.0)
                k_rest = k_rest.to(q.dtype)
            # Always so. Of a product that leads to another, Triton lets each half of the warps compute all,
            # but it does not see one behind a branch.
            if block >= 0:
                logits = tl.zeros((QUERIES, KEYS), tl.float32)
                if REST > 0:  # noqa: SIM102
                    if num_keys > 0:
                        logits = tl.dot(q_rest, tl.trans(k_rest), logits)
                logits = tl.dot(q, tl.trans(c), logits) * (scale * LOG2E)
                logits = tl.where(is_key[None, :], logits, float("-inf"))
                new_top = tl.maximum(top, tl.max(logits, 1))
                exponentials = tl.exp2(logits - new_top[:, None])
                shrink = tl.exp2(top - new_top)
                total = total * shrink + tl.sum(exponentials, 1)
                weights, top = exponentials.to(q.dtype), new_top
            sums = tl.dot(weights, c, sums * shrink[:, None])

        attended = (sums * (1.0 / total)[:, None]).to(q.dtype)
        tl.debug_barrier()
        tl.store(own + dims[None, :], attended, mask=(dims < RANK)[None, :])
        tl.debug_barrier()
        up = tl.zeros((QUERIES, SIZE_BLOCK), tl.float32)
        for first in tl.range(0, RANK, DEPTH, num_stages=1):
            at = first + depth
            of_rank = tl.load(own + at[None, :], mask=(at < RANK)[None, :], other=0.0)
            up_weight = tl.load(
                value_up + head * value_head + columns[None, :] * value_row + at[:, None] * value_column,
                mask=(columns < SIZE)[None, :] & (at < RANK)[:, None],
                other=0.0,
            )
            up = tl.dot(of_rank, up_weight, up)
        tl.debug_barrier()
        past = top + tl.log2(total)
        place = token * HEADS + head
        at = out + place[:, None] * SIZE + columns[None, :]
        mask = row_mask[:, None] & (columns < SIZE)[None, :]
        if num_parts == 1:
            # What attend's sum of exponentials is of this one's.
            others = tl.exp2(tl.load(stats + place, mask=row_mask, other=0.0) - past)
            before = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            found = before + (up * v_scale - before) * (1.0 / (1.0 + others))[:, None]
            tl.store(at, found.to(out.dtype.element_ty), mask=mask)
        else:
            own_row = item * QUERIES + tl.arange(0, QUERIES)
            tl.store(stats_of_parts + own_row, past, mask=row_mask)
            tl.store(sums_of_parts + own_row[:, None] * SIZE + columns[None, :], up * v_scale, mask=mask)


@triton.jit
def _parts(  # type: ignore[no-untyped-def]
    new, firsts, programs, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr
):
    """Of each sequence: parts of a tile's keys, of which each program has one at most, and their end."""
    tiles = tl.where(firsts > 0, (new + QUERIES - 1) // QUERIES, 0)
    most = tl.maximum(programs // tl.maximum(tl.sum(tiles, 0) * HEADS, 1), 1)
    parts = tl.maximum(tl.minimum(firsts // (4 * KEYS), most), 1)
    return parts, tl.cumsum(tiles * parts, 0)


@triton.jit
def _item(number, parts, ends, SEQUENCES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sequence of a part of a tile, the part's number within it, and parts of a tile."""
    sequences = tl.arange(0, SEQUENCES)
    seq = tl.sum((ends <= number).to(tl.int32), 0)
    before = tl.max(tl.where(sequences < seq, ends, 0), 0)
    return seq, number - before, _of(sequences, seq, parts)


@triton.jit(
    do_not_specialize=["num_seqs", "extra", "programs"], do_not_specialize_on_alignment=["bounds", "lengths"]
)
def add_parts(  # type: ignore[no-untyped-def]
    bounds,
    lengths,
    out,
    stats,
    sums_of_parts,
    stats_of_parts,
    num_seqs,
    extra,
    programs,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    SEQUENCES: tl.constexpr,
    LEAST: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What ``attend`` left, with the parts of ``attend_past``, in their order: ROWS rows of a tile."""
    item = tl.program_id(0)
    new, firsts, _ = _shares(bounds, lengths, num_seqs, extra, SEQUENCES, LEAST)
    parts, ends = _parts(new, firsts, programs, HEADS, QUERIES, KEYS)
    if item >= tl.max(ends, 0) * HEADS:
        return
    seq, number, num_parts = _item(item // HEADS, parts, ends, SEQUENCES)
    if (num_parts == 1) | (number % num_parts > 0):
        return
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = number // num_parts * QUERIES + row
    row_mask = first < _of(tl.arange(0, SEQUENCES), seq, new)
    columns = tl.arange(0, SIZE_BLOCK)
    mask = row_mask[:, None] & (columns < SIZE)[None, :]
    place = (tl.load(bounds + seq) + first).to(tl.int64) * HEADS + item % HEADS
    at = out + place[:, None] * SIZE + columns[None, :]
    sums = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    top, total = tl.load(stats + place, mask=row_mask, other=0.0), tl.full((ROWS,), 1.0, tl.float32)
    for part in range(0, num_parts):
        of_part = (item + part * HEADS) * QUERIES + row
        part_top = tl.load(stats_of_parts + of_part, mask=row_mask, other=0.0)
        found = tl.load(sums_of_parts + of_part[:, None] * SIZE + columns[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, part_top)
        shrink, share = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
        sums = sums * shrink[:, None] + found * share[:, None]
        total = total * shrink + share
        top = new_top
    tl.store(at, (sums * (1.0 / total)[:, None]).to(out.dtype.element_ty), mask=mask)
