"""Many tokens of each sequence through its state, as Triton kernels: in chunks of 64, by matrix products.

A ragged batch, whose lengths only the device knows: programs take one chunk, or one sequence, after the other
while there are any. States stay in registers from chunk to chunk, in float32; factors of products have the 16
bits of the tokens, as in flash-linear-attention and mamba-ssm. The convolution takes any dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ad_flashinfer_pass.kernels.state import step
from ad_flashinfer_pass.kernels.state.step import _NAN, _plain, _time_step

_SIZE = 64
"""Tokens of a chunk."""
_COLUMNS = 32
"""Of a state that one program holds: few, so that one sequence has work for all SMs."""
_CHUNKS, _SCAN = {"num_warps": 4, "num_stages": 1}, {"num_warps": 4, "num_stages": 2}
"""How kernels without and with the state are launched."""
_TURNS, _SEQUENCES = 64, 4
"""Programs that share all chunks, and all sequences, of a part of a state."""
_TOKENS, _CHANNELS = 8, 128
"""Of a convolution, that one program computes at a time."""


def convolve(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    pool: Tensor,
    slot_idx: Tensor,
    input_pos: Tensor,
    cu_seqlen: Tensor,
) -> None:
    """``ops.cached_causal_conv1d``, to out [tokens, channels]; the rest as of ``step.delta_rule``."""
    x, num, channels = _plain(x), slot_idx.shape[0], x.shape[1]
    with torch.cuda.device_of(x):
        _convolve[(triton.cdiv(channels, _CHANNELS), min(_TURNS, x.shape[0] // _SIZE + num))](
            x,
            weight.contiguous(),
            bias,
            pool,
            slot_idx,
            input_pos,
            cu_seqlen,
            out,
            x.stride(0),
            num,
            channels,
            WIDTH=weight.shape[1],
            SILU=activation == "silu",
            BLOCK=_CHANNELS,
            TILE=max(_TOKENS, triton.next_power_of_2(weight.shape[1])),  # only the first reads the state
            SIZE=_SIZE,
            ROWS=_rows(num),
            maxnreg=128,  # it would take twice as many, and half as many programs would wait for memory
        )


def delta_rule(
    normalise: bool,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    pool: Tensor,
    slot_idx: Tensor,
    input_pos: Tensor,
    cu_seqlen: Tensor,
) -> None:
    """``ops.cached_gated_delta_rule``, one decay a head; arguments as of ``step.delta_rule``.

    Heads of other sizes than models have, below 48 or no multiple of 16, go token by token: on an H200 chunks
    of 8 x 6 were wrong, which the interpreter does not show.
    """
    query, key, value, g, beta = given = [_plain(x) for x in (query, key, value, g, beta)]
    if any(size < 48 or size % 16 for size in (key.shape[2], value.shape[2])):
        step.delta_rule(normalise, out, query, key, value, g, beta, pool, slot_idx, input_pos, cu_seqlen)
        return
    (tokens, heads, v_dim), k_dim, num = value.shape, key.shape[2], slot_idx.shape[0]
    k_block, columns = _block(k_dim), min(_COLUMNS, _block(v_dim))
    keys, values, scores = (
        value.new_empty(tokens, heads, size, dtype=key.dtype) for size in (k_dim, v_dim, _SIZE)
    )
    factors = value.new_empty(3, heads, tokens, dtype=torch.float32)
    shape: dict[str, Any] = {"GROUP": heads // key.shape[1], "K_DIM": k_dim, "V_DIM": v_dim}
    shape |= {"K_BLOCK": k_block, "SIZE": _SIZE}
    with torch.cuda.device_of(value):
        _delta_chunks[(min(_TURNS, tokens // _SIZE + num), heads)](
            *given,
            cu_seqlen,
            keys,
            values,
            scores,
            factors,
            *(stride for x in given for stride in x.stride()[:2]),
            k_dim**-0.5,
            num,
            tokens,
            **shape,
            V_BLOCK=_block(v_dim),
            NORMALISE=normalise,
            ROWS=_rows(num),
            LEVELS=_SIZE.bit_length() - 1,
            **_CHUNKS,
        )
        _delta_scan[(triton.cdiv(v_dim, columns), heads, min(_SEQUENCES, num))](
            query,
            key,
            keys,
            values,
            scores,
            factors,
            pool,
            slot_idx,
            input_pos,
            cu_seqlen,
            out,
            *(stride for x in (query, key) for stride in x.stride()[:2]),
            num,
            tokens,
            **shape,
            V_BLOCK=columns,
            ROWS=_rows(num),
            **_SCAN,
        )


def ssd(
    constants: tuple[Tensor, Tensor | None, Tensor | None],
    softplus: bool,
    limits: tuple[float, float | None],
    out: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    pool: Tensor,
    slot_idx: Tensor,
    input_pos: Tensor,
    cu_seqlen: Tensor,
) -> None:
    """``ops.cached_ssd_scan``; arguments as of ``step.ssd``."""
    given = [_plain(x) for x in (hidden_states, dt, B, C)]
    (_, heads, head_dim), num = hidden_states.shape, slot_idx.shape[0]
    columns = min(_COLUMNS, _block(head_dim))
    with torch.cuda.device_of(out):
        _ssd_scan[(triton.cdiv(head_dim, columns), heads, min(_SEQUENCES, num))](
            *given,
            *(None if x is None else x.contiguous() for x in constants),
            pool,
            slot_idx,
            input_pos,
            cu_seqlen,
            out,
            *(stride for x in given for stride in x.stride()[:2]),
            limits[0],
            float("inf") if limits[1] is None else limits[1],
            num,
            GROUP=heads // B.shape[1],
            DIM=head_dim,
            STATE=B.shape[2],
            BLOCK=columns,
            STATE_BLOCK=_block(B.shape[2]),
            SIZE=_SIZE,
            SOFTPLUS=softplus,
            ROWS=_rows(num),
            **_SCAN,
        )


def _rows(num: int) -> int:
    """Of ``_find_chunk``: in steps so large that few kernels are compiled."""
    return max(128, triton.next_power_of_2(num))


def _block(size: int) -> int:
    """What a matrix product takes."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def _chunks(cu_seqlen, num, SIZE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each sequence, how many chunks it and those before it have; and how many all have."""
    rows = tl.arange(0, ROWS)
    starts = tl.load(cu_seqlen + rows, mask=rows < num, other=0)
    ends = tl.load(cu_seqlen + rows + 1, mask=rows < num, other=0)
    counts = (ends - starts + SIZE - 1) // SIZE
    return tl.cumsum(counts), tl.sum(counts)


@triton.jit
def _find(last, index):  # type: ignore[no-untyped-def]
    """The sequence that has a chunk, and the number of that chunk in it."""
    return tl.sum((last <= index).to(tl.int32)), index - tl.max(tl.where(last <= index, last, 0))


@triton.jit
def _num_sequences(cu_seqlen, num, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Without those at the end that have no tokens."""
    rows = tl.arange(0, ROWS)
    end = tl.load(cu_seqlen + num)
    return tl.sum((tl.load(cu_seqlen + rows, mask=rows < num, other=end) < end).to(tl.int32))


@triton.jit
def _convolve(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    pool,
    slot_idx,
    input_pos,
    cu_seqlen,
    out,
    x_stride,
    num,
    num_channels,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some channels of chunks; the first one of a sequence keeps its last tokens."""
    last, num_chunks = _chunks(cu_seqlen, num, SIZE, ROWS)
    for index in range(tl.program_id(1), num_chunks, tl.num_programs(1)):
        row, number = _find(last, index)
        start = tl.load(cu_seqlen + row)
        length = tl.load(cu_seqlen + row + 1) - start
        source = x + start.to(tl.int64) * x_stride
        target = out + start.to(tl.int64) * num_channels
        state = pool + tl.load(slot_idx + row) * num_channels * (WIDTH - 1)
        channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = channels < num_channels
        # Places are counted from the first token; those before it are in the state, of one that begins none.
        oldest = tl.where(tl.load(input_pos + row) > 0, 1 - WIDTH, 0)
        for first in range(number * SIZE, tl.minimum((number + 1) * SIZE, length), TILE):
            tokens = first + tl.arange(0, TILE)
            total = tl.zeros([TILE, BLOCK], tl.float32)
            if bias is not None:
                total += tl.load(bias + channels, mask=mask, other=0.0).to(tl.float32)[None, :]
            for at in tl.static_range(WIDTH):
                place = tokens + (at + 1 - WIDTH)
                is_new = ((place >= 0) & (place < length))[:, None] & mask[None, :]
                window = tl.load(
                    source + place[:, None] * x_stride + channels[None, :], mask=is_new, other=0.0
                )
                weights = tl.load(weight + channels * WIDTH + at, mask=mask, other=0.0).to(tl.float32)
                total += window.to(tl.float32) * weights[None, :]
            if first == 0:
                for at in tl.static_range(WIDTH - 1):
                    place = tokens + (at + 1 - WIDTH)
                    is_old = ((place < 0) & (place >= oldest))[:, None] & mask[None, :]
                    spot = channels[None, :] * (WIDTH - 1) + (place + WIDTH - 1)[:, None]
                    window = tl.load(state + spot, mask=is_old, other=0.0)
                    weights = tl.load(weight + channels * WIDTH + at, mask=mask, other=0.0).to(tl.float32)
                    total += window.to(tl.float32) * weights[None, :]
            result = total.to(out.dtype.element_ty)
            if SILU:
                wide = result.to(tl.float32)
                result = (wide / (1 + tl.exp(-wide))).to(out.dtype.element_ty)
            is_token = (tokens < length)[:, None] & mask[None, :]
            tl.store(target + tokens[:, None] * num_channels + channels[None, :], result, mask=is_token)
        if number == 0:
            tl.debug_barrier()  # what is written below was read above by other threads
            for at in tl.static_range(WIDTH - 1):
                token = length - (WIDTH - 1) + at
                has = channels < tl.where(token >= 0, num_channels, 0)
                new = tl.load(source + token.to(tl.int64) * x_stride + channels, mask=has, other=0.0)
                has = channels < tl.where((token < 0) & (token >= oldest), num_channels, 0)
                old = tl.load(state + channels * (WIDTH - 1) + token + WIDTH - 1, mask=has, other=0.0)
                tl.store(state + channels * (WIDTH - 1) + at, tl.where(token >= 0, new, old), mask=mask)


@triton.jit
def _delta_chunks(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    g,
    beta,
    cu_seqlen,
    keys,
    values,
    scores,
    factors,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    g_row,
    g_head,
    beta_row,
    beta_head,
    scale,
    num,
    num_tokens,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    V_BLOCK: tl.constexpr,
    NORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """What of a head's chunks does not need the state.

    Each token learns what the ones before it have not: what it adds is values - keys @ state, with the state
    before the chunk. Scores are of queries with keys, decayed; factors [3, heads, tokens] are those of the
    rows of queries and of keys, and the logarithm of the decay since the chunk began.
    """
    head, heads = tl.program_id(1), tl.num_programs(1)
    at, ks, vs = tl.arange(0, SIZE), tl.arange(0, K_BLOCK), tl.arange(0, V_BLOCK)
    all_chunks, num_chunks = _chunks(cu_seqlen, num, SIZE, ROWS)
    for index in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        row, number = _find(all_chunks, index)
        tokens = tl.load(cu_seqlen + row) + number * SIZE + at
        is_token = tokens < tl.load(cu_seqlen + row + 1)
        tokens = tokens.to(tl.int64)
        k_mask = is_token[:, None] & (ks < K_DIM)[None, :]
        place = query + tokens[:, None] * query_row + head // GROUP * query_head + ks[None, :]
        q = tl.load(place, mask=k_mask, other=0.0)
        k = tl.load(
            key + tokens[:, None] * key_row + head // GROUP * key_head + ks[None, :], mask=k_mask, other=0.0
        )
        learned = tl.load(beta + tokens * beta_row + head * beta_head, mask=is_token, other=0.0).to(
            tl.float32
        )
        total = tl.load(g + tokens * g_row + head * g_head, mask=is_token, other=0.0).to(tl.float32)
        last = tl.sum(total)
        total = tl.cumsum(total)
        of_query = tl.full([SIZE], scale, tl.float32)
        of_key = tl.full([SIZE], 1.0, tl.float32)
        if NORMALISE:
            wide = q.to(tl.float32)
            of_query /= tl.sqrt(tl.sum(wide * wide, 1) + 1e-6)
            wide = k.to(tl.float32)
            of_key /= tl.sqrt(tl.sum(wide * wide, 1) + 1e-6)
        # Exponents above the diagonal, where they would be positive, are not taken.
        pairs = tl.exp(tl.where(at[:, None] >= at[None, :], total[:, None] - total[None, :], float("-inf")))
        pairs *= of_key[None, :]
        found = tl.dot(q, tl.trans(k)) * pairs * of_query[:, None]
        place = scores + (tokens[:, None] * heads + head) * SIZE + at[None, :]
        tl.store(place, found.to(scores.dtype.element_ty), mask=is_token[:, None])
        found = tl.dot(k, tl.trans(k)) * pairs * (of_key * learned)[:, None]
        inverse = _inverse(tl.where(at[:, None] > at[None, :], found, 0.0), SIZE, LEVELS) * learned[None, :]
        place = value + tokens[:, None] * value_row + head * value_head + vs[None, :]
        v_mask = is_token[:, None] & (vs < V_DIM)[None, :]
        v = tl.load(place, mask=v_mask, other=0.0).to(k.dtype)
        found = tl.dot(inverse.to(k.dtype), v)
        place = values + (tokens[:, None] * heads + head) * V_DIM + vs[None, :]
        tl.store(place, found.to(values.dtype.element_ty), mask=v_mask)
        inverse *= (of_key * tl.exp(total))[None, :]
        found = tl.dot(inverse.to(k.dtype), k)
        place = keys + (tokens[:, None] * heads + head) * K_DIM + ks[None, :]
        tl.store(place, found.to(keys.dtype.element_ty), mask=k_mask)
        place = factors + head * num_tokens + tokens
        tl.store(place, of_query * tl.exp(total), mask=is_token)
        tl.store(place + heads * num_tokens, of_key * tl.exp(last - total), mask=is_token)
        tl.store(place + 2 * heads * num_tokens, total, mask=is_token)


@triton.jit
def _inverse(a, SIZE: tl.constexpr, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the identity plus a, which is below the diagonal: of blocks of the diagonal, ever twice as large.

    Of two blocks p and r beside each other with s below p, the inverse has -r^-1 s p^-1 there. A series of
    powers of a would take as many products, and its terms can be far larger than their sum.
    """
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    result = tl.where(rows == columns, 1.0, tl.where(rows // 2 == columns // 2, -a, 0.0))
    for level in tl.static_range(1, LEVELS):
        is_pair = (rows >> level != columns >> level) & (rows >> (level + 1) == columns >> (level + 1))
        below = tl.dot(result, tl.where(is_pair, a, 0.0))
        result -= tl.dot(below, result)
    return result


@triton.jit
def _delta_scan(  # type: ignore[no-untyped-def]
    query,
    key,
    keys,
    values,
    scores,
    factors,
    pool,
    slot_idx,
    input_pos,
    cu_seqlen,
    out,
    query_row,
    query_head,
    key_row,
    key_head,
    num,
    num_tokens,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    V_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some columns of the matrix of one head, through the chunks of sequences."""
    head, heads = tl.program_id(1), tl.num_programs(1)
    ks, vs = tl.arange(0, K_BLOCK), tl.program_id(0) * V_BLOCK + tl.arange(0, V_BLOCK)
    in_k, in_v = ks < K_DIM, vs < V_DIM
    for row in range(tl.program_id(2), _num_sequences(cu_seqlen, num, ROWS), tl.num_programs(2)):
        start, end = tl.load(cu_seqlen + row), tl.load(cu_seqlen + row + 1)
        slot = tl.load(slot_idx + row) * heads + head
        stored = pool + (slot * K_DIM + ks[:, None]) * V_DIM + vs[None, :]
        mask = in_k[:, None] & in_v[None, :]
        known = tl.where(tl.load(input_pos + row) > 0, K_DIM, 0)
        state = tl.load(stored, mask=mask & (ks < known)[:, None], other=0.0).to(tl.float32)
        for first in range(start, end, SIZE):
            tokens = first + tl.arange(0, SIZE)
            is_token = tokens < end
            tokens = tokens.to(tl.int64)
            k_mask, v_mask = is_token[:, None] & in_k[None, :], is_token[:, None] & in_v[None, :]
            rows = tokens * heads + head
            w = tl.load(keys + rows[:, None] * K_DIM + ks[None, :], mask=k_mask, other=0.0)
            old = state.to(w.dtype)
            new = tl.load(values + rows[:, None] * V_DIM + vs[None, :], mask=v_mask, other=0.0).to(tl.float32)
            new -= tl.dot(w, old)
            of_query = tl.load(factors + head * num_tokens + tokens, mask=is_token, other=0.0)
            of_key = tl.load(factors + (heads + head) * num_tokens + tokens, mask=is_token, other=0.0)
            decay = tl.load(factors + (2 * heads + head) * num_tokens + tl.minimum(first + SIZE, end) - 1)
            place = query + tokens[:, None] * query_row + head // GROUP * query_head + ks[None, :]
            q = tl.load(place, mask=k_mask, other=0.0)
            result = tl.dot(q, old) * of_query[:, None]
            place = scores + rows[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
            p = tl.load(place, mask=is_token[:, None], other=0.0)
            result += tl.dot(p, new.to(p.dtype))
            target = out + rows[:, None] * V_DIM + vs[None, :]
            tl.store(target, result.to(out.dtype.element_ty), mask=v_mask)
            place = key + tokens[:, None] * key_row + head // GROUP * key_head + ks[None, :]
            k = tl.load(place, mask=k_mask, other=0.0)
            new = (new * of_key[:, None]).to(k.dtype)
            state = state * tl.exp(decay) + tl.dot(tl.trans(k), new)
        tl.store(stored, state, mask=mask)


@triton.jit
def _ssd_scan(  # type: ignore[no-untyped-def]
    hidden_states,
    dt,
    B,
    C,
    A,
    D,
    dt_bias,
    pool,
    slot_idx,
    input_pos,
    cu_seqlen,
    out,
    x_row,
    x_head,
    dt_row,
    dt_head,
    b_row,
    b_group,
    c_row,
    c_group,
    least,
    most,
    num,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some rows of the matrix of one head, as columns, through the chunks of sequences."""
    head, heads = tl.program_id(1), tl.num_programs(1)
    at, states = tl.arange(0, SIZE), tl.arange(0, STATE_BLOCK)
    dims = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_dim, in_state = dims < DIM, states < STATE
    rate = tl.load(A + head).to(tl.float32)
    for row in range(tl.program_id(2), _num_sequences(cu_seqlen, num, ROWS), tl.num_programs(2)):
        start, end = tl.load(cu_seqlen + row), tl.load(cu_seqlen + row + 1)
        slot = tl.load(slot_idx + row) * heads + head
        stored = pool + (slot * DIM + dims[None, :]) * STATE + states[:, None]
        mask = in_state[:, None] & in_dim[None, :]
        known = tl.where(tl.load(input_pos + row) > 0, DIM, 0)
        state = tl.load(stored, mask=mask & (dims < known)[None, :], other=0.0).to(tl.float32)
        for first in range(start, end, SIZE):
            is_token = first + at < end
            tokens = (first + at).to(tl.int64)
            step = tl.load(dt + tokens * dt_row + head * dt_head, mask=is_token, other=0.0)
            step = _time_step(step, dt_bias, head, None, SOFTPLUS)
            step = tl.minimum(tl.maximum(step, least, propagate_nan=_NAN), most, propagate_nan=_NAN)
            step = tl.where(is_token, step, 0.0)
            total, last = tl.cumsum(step * rate), tl.sum(step * rate)
            s_mask, x_mask = is_token[:, None] & in_state[None, :], is_token[:, None] & in_dim[None, :]
            place = C + tokens[:, None] * c_row + head // GROUP * c_group + states[None, :]
            c = tl.load(place, mask=s_mask, other=0.0)
            place = B + tokens[:, None] * b_row + head // GROUP * b_group + states[None, :]
            b = tl.load(place, mask=s_mask, other=0.0)
            place = hidden_states + tokens[:, None] * x_row + head * x_head + dims[None, :]
            x = tl.load(place, mask=x_mask, other=0.0)
            result = tl.dot(c, state.to(c.dtype)) * tl.exp(total)[:, None]
            pairs = tl.where(at[:, None] >= at[None, :], total[:, None] - total[None, :], float("-inf"))
            pairs = tl.exp(pairs) * step[None, :] * tl.dot(c, tl.trans(b))
            result += tl.dot(pairs.to(x.dtype), x)
            if D is not None:
                result += x.to(tl.float32) * tl.load(D + head).to(tl.float32)
            target = out + (tokens[:, None] * heads + head) * DIM + dims[None, :]
            tl.store(target, result.to(out.dtype.element_ty), mask=x_mask)
            x = (x.to(tl.float32) * (step * tl.exp(last - total))[:, None]).to(x.dtype)
            state = state * tl.exp(last) + tl.dot(tl.trans(b), x)
        tl.store(stored, state, mask=mask)
