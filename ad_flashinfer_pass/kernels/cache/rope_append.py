"""Rotary embedding of Q and K, and append of K and V to the pages, in one Triton launch.

Before: q', k' = rope(q, k); append(k', v)        two kernels that read and write K twice
After:  q' = rope_append(q, k, v, kv_cache, ...)   K goes from the projection to its page once

The rotation is taken in float32 and rounded once, where rotations written in torch round each product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ad_flashinfer_pass.kernels import overlap
from ad_flashinfer_pass.kernels.cache.append import _converted
from ad_flashinfer_pass.kernels.overlap import await_turn

_TILE = 2048
"""Elements of Q, or of K and of V, that one program moves, at most, unless one head is larger."""


def rope_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    block_table: Tensor | None = None,
    table_rows: Tensor | None = None,
    clear_before: int = 0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    norms: tuple[Tensor, Tensor, float] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate Q and K, write K and V to their slots, and return the rotated Q.

    Args:
        query: [b, s, num_heads, head_dim], any strides.
        key: [b, s, num_kv_heads, head_dim], any strides.
        value: [b, s, num_kv_heads, v_head_dim], any strides.
        kv_cache: [num_pages, 2, num_kv_heads, page_size, >= max(head_dim, v_head_dim)], K at [:, 0], V at
            [:, 1]; any strides of page, K or V, head and slot, so that it may be one layer of a larger pool.
            Written in place at the slots and nowhere else. A number beyond the range of an 8-bit float
            becomes the largest that it has, of the same sign; NaN stays NaN.
        slot_mapping: int32 or int64 [b * s], page * page_size + offset of each token. A negative slot is not
            written: padding.
        cos: [rows, rotary_dim // 2], any strides, any float dtype: of the angle of each pair. A table that
            repeats each angle is passed as its view, ``cos[:, : rotary_dim // 2]`` or ``cos[:, ::2]``. Head
            elements from rotary_dim on are not rotated.
        sin: like cos, with its strides.
        positions: int32 or int64 [b * s], row of cos and sin of each token, kept within them; None: row i is
            token i's.
        interleaved: pairs are elements 2 i and 2 i + 1 (GPT-J); else i and i + rotary_dim // 2 (GPT-NeoX).
        block_table: int32 [n, blocks], rows contiguous: if given, slots count from the start of their
            sequence, whose pages are in its row of the table.
        table_rows: int32 or int64 [b * s], each token's row of ``block_table``; ignored for negative slots.
        clear_before: of the tokens before this one, those that are the last of their row also zero what is
            behind them in their page: FMHA v2 multiplies it by zero, and zero times a NaN is NaN.
        k_scale: K is divided by it on the way to the cache.
        v_scale: V is divided by it.
        norms: weights [head_dim], contiguous, of RMSNorms of the heads of Q and of K, which come first, and
            what is added to the mean squares.
        out: [b, s, num_heads, head_dim], contiguous, for the result; must not share memory with the inputs.

    Returns:
        [b, s, num_heads, head_dim] in the dtype of query, contiguous.

    Raises:
        ValueError: cos and sin do not fit the heads or the tokens, or a block table comes without rows.
    """
    half = cos.shape[1]
    if cos.shape != sin.shape or cos.stride() != sin.stride() or 2 * half > query.shape[3]:
        raise ValueError(
            f"cos and sin must have one shape [rows, at most {query.shape[3] // 2}] and the same strides, "
            f"got {list(cos.shape)} and {list(sin.shape)}; pass one element a pair."
        )
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    tokens = query.shape[0] * query.shape[1]
    if positions is None and cos.shape[0] < tokens:
        raise ValueError(
            f"cos has {cos.shape[0]} rows for {tokens} tokens; give positions, or a row a token."
        )
    place = (slot_mapping, block_table, table_rows, clear_before, k_scale, v_scale)
    _launch(query, out, key, value, kv_cache, place, (cos, sin, positions, interleaved), norms)
    return out


def append(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    block_table: Tensor | None = None,
    table_rows: Tensor | None = None,
    clear_before: int = 0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Write K and V to their slots as they are; arguments as in ``rope_append``."""
    place = (slot_mapping, block_table, table_rows, clear_before, k_scale, v_scale)
    _launch(None, None, key, value, kv_cache, place, None, None)


def _launch(
    query: Tensor | None,
    out: Tensor | None,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    place: tuple[Tensor, Tensor | None, Tensor | None, int, float, float],
    rotation: tuple[Tensor, Tensor, Tensor | None, bool] | None,
    norms: tuple[Tensor, Tensor, float] | None,
) -> None:
    slot_mapping, block_table, table_rows, clear_before, k_scale, v_scale = place
    cos, sin, positions, interleaved = rotation or (key[0, 0, :, :0], key[0, 0, :, :0], None, False)
    if (block_table is None) != (table_rows is None):
        raise ValueError("block_table and table_rows come together: which row is each token's?")
    (batch, tokens_per_row, num_kv_heads, head_dim), v_head_dim = key.shape, value.shape[3]
    num_heads, half = 0 if query is None else query.shape[2], cos.shape[1]
    dim_block = triton.next_power_of_2(max(head_dim, v_head_dim))
    head_block = min(triton.next_power_of_2(max(num_heads, num_kv_heads)), max(1, _TILE // dim_block))
    q_tiles, kv_tiles = triton.cdiv(num_heads, head_block), triton.cdiv(num_kv_heads, head_block)
    limit = torch.finfo(kv_cache.dtype).max if kv_cache.dtype.itemsize == 1 else None
    _rope_append[(batch * tokens_per_row, q_tiles + kv_tiles)](
        key if query is None else query,
        key,
        value,
        key if out is None else out,
        kv_cache,
        slot_mapping,
        cos,
        sin,
        slot_mapping if positions is None else positions,
        slot_mapping if block_table is None else block_table,
        slot_mapping if table_rows is None else table_rows,
        *((None, None, 0.0) if norms is None else norms),
        1.0 / k_scale,
        1.0 / v_scale,
        tokens_per_row,
        num_heads,
        num_kv_heads,
        cos.shape[0],
        0 if block_table is None else block_table.stride(0),
        batch * tokens_per_row,
        clear_before,
        q_tiles,
        *(key if query is None else query).stride(),
        *key.stride(),
        *value.stride(),
        *kv_cache.stride()[:4],
        *cos.stride(),
        PAGE_SIZE=kv_cache.shape[3],
        HEAD_DIM=head_dim,
        V_HEAD_DIM=v_head_dim,
        HALF=half,
        INTERLEAVED=interleaved,
        BY_POSITION=positions is not None,
        BY_TABLE=block_table is not None,
        CLEARS=block_table is not None and clear_before > 0,
        HEAD_BLOCK=head_block,
        HALF_BLOCK=triton.next_power_of_2(max(half, 1)),
        REST_BLOCK=triton.next_power_of_2(max(head_dim - 2 * half, 1)),
        V_BLOCK=triton.next_power_of_2(v_head_dim),
        DIM_BLOCK=dim_block,
        LIMIT=limit,
        **overlap.options(key.device, batch * tokens_per_row),
    )


@triton.jit
def _norm_scale(x, y, rest, eps, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / sqrt(mean square + eps) of each head, of which these are all elements; [heads, 1]."""
    squares = tl.sum(x * x + y * y, axis=1) + tl.sum(rest * rest, axis=1)
    return tl.rsqrt(squares / HEAD_DIM + eps)[:, None]


@triton.jit(
    do_not_specialize=[
        "eps",
        "k_factor",
        "v_factor",
        "tokens_per_row",
        "num_rows",
        "num_tokens",
        "clear_before",
    ]
)
def _rope_append(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    out,
    kv_cache,
    slot_mapping,
    cos,
    sin,
    positions,
    block_table,
    table_rows,
    q_norm,
    k_norm,
    eps,
    k_factor,
    v_factor,
    tokens_per_row,
    num_heads,
    num_kv_heads,
    num_rows,
    table_stride,
    num_tokens,
    clear_before,
    q_tiles,
    q_row_stride,
    q_token_stride,
    q_head_stride,
    q_dim_stride,
    k_row_stride,
    k_token_stride,
    k_head_stride,
    k_dim_stride,
    v_row_stride,
    v_token_stride,
    v_head_stride,
    v_dim_stride,
    page_stride,
    kv_stride,
    head_stride,
    slot_stride,
    angle_row_stride,
    angle_stride,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BY_POSITION: tl.constexpr,
    BY_TABLE: tl.constexpr,
    CLEARS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One token and HEAD_BLOCK of its heads: of Q in the first q_tiles programs, then of K and V.

    The branches share no name: Triton wants those that do to have one type.
    """
    await_turn(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    row, column = token // tokens_per_row, token % tokens_per_row

    pairs = tl.arange(0, HALF_BLOCK)[None, :]
    first = pairs * 2 if INTERLEAVED else pairs
    second = first + (1 if INTERLEAVED else HALF)
    angle_row = token
    if BY_POSITION:
        angle_row = tl.load(positions + token).to(tl.int64)
    angle_row = tl.minimum(tl.maximum(angle_row, 0), num_rows - 1)
    angles = angle_row * angle_row_stride + pairs * angle_stride
    c = tl.load(cos + angles, mask=pairs < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + angles, mask=pairs < HALF, other=0.0).to(tl.float32)
    rest = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]

    if tile < q_tiles:
        q_heads = tile * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None].to(tl.int64)
        q_mask = (q_heads < num_heads) & (pairs < HALF)
        q_source = query + row * q_row_stride + column * q_token_stride + q_heads * q_head_stride
        q_x = tl.load(q_source + first * q_dim_stride, mask=q_mask, other=0.0).to(tl.float32)
        q_y = tl.load(q_source + second * q_dim_stride, mask=q_mask, other=0.0).to(tl.float32)
        q_rest_mask = (q_heads < num_heads) & (rest < HEAD_DIM)
        q_rest = tl.zeros((HEAD_BLOCK, REST_BLOCK), dtype=tl.float32)
        if HEAD_DIM > 2 * HALF:
            q_rest = tl.load(q_source + rest * q_dim_stride, mask=q_rest_mask, other=0.0).to(tl.float32)
        if q_norm is not None:
            q_scale = _norm_scale(q_x, q_y, q_rest, eps, HEAD_DIM)
            q_x *= q_scale * tl.load(q_norm + first, mask=pairs < HALF, other=0.0).to(tl.float32)
            q_y *= q_scale * tl.load(q_norm + second, mask=pairs < HALF, other=0.0).to(tl.float32)
            q_rest *= q_scale * tl.load(q_norm + rest, mask=rest < HEAD_DIM, other=0.0).to(tl.float32)
        q_target = out + (token * num_heads + q_heads) * HEAD_DIM
        tl.store(q_target + first, (q_x * c - q_y * s).to(out.dtype.element_ty), mask=q_mask)
        tl.store(q_target + second, (q_y * c + q_x * s).to(out.dtype.element_ty), mask=q_mask)
        if HEAD_DIM > 2 * HALF:
            tl.store(q_target + rest, q_rest.to(out.dtype.element_ty), mask=q_rest_mask)
    elif tl.load(slot_mapping + token) >= 0:
        slot = tl.load(slot_mapping + token).to(tl.int64)
        page = slot // PAGE_SIZE
        if BY_TABLE:
            table_row = tl.load(table_rows + token).to(tl.int64)
            page = tl.load(block_table + table_row * table_stride + page).to(tl.int64)
        kv_heads = (tile - q_tiles) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None].to(tl.int64)
        target = kv_cache + page * page_stride + (slot % PAGE_SIZE) * slot_stride + kv_heads * head_stride
        dtype: tl.constexpr = kv_cache.dtype.element_ty

        k_mask = (kv_heads < num_kv_heads) & (pairs < HALF)
        k_source = key + row * k_row_stride + column * k_token_stride + kv_heads * k_head_stride
        k_x = tl.load(k_source + first * k_dim_stride, mask=k_mask, other=0.0).to(tl.float32)
        k_y = tl.load(k_source + second * k_dim_stride, mask=k_mask, other=0.0).to(tl.float32)
        k_rest_mask = (kv_heads < num_kv_heads) & (rest < HEAD_DIM)
        k_rest = tl.zeros((HEAD_BLOCK, REST_BLOCK), dtype=tl.float32)
        if HEAD_DIM > 2 * HALF:
            k_rest = tl.load(k_source + rest * k_dim_stride, mask=k_rest_mask, other=0.0).to(tl.float32)
        if k_norm is not None:
            k_scale = _norm_scale(k_x, k_y, k_rest, eps, HEAD_DIM)
            k_x *= k_scale * tl.load(k_norm + first, mask=pairs < HALF, other=0.0).to(tl.float32)
            k_y *= k_scale * tl.load(k_norm + second, mask=pairs < HALF, other=0.0).to(tl.float32)
            k_rest *= k_scale * tl.load(k_norm + rest, mask=rest < HEAD_DIM, other=0.0).to(tl.float32)
        tl.store(target + first, _converted(k_x * c - k_y * s, k_factor, dtype, LIMIT), mask=k_mask)
        tl.store(target + second, _converted(k_y * c + k_x * s, k_factor, dtype, LIMIT), mask=k_mask)
        if HEAD_DIM > 2 * HALF:
            tl.store(target + rest, _converted(k_rest, k_factor, dtype, LIMIT), mask=k_rest_mask)

        dims = tl.arange(0, V_BLOCK)[None, :]
        v_mask = (kv_heads < num_kv_heads) & (dims < V_HEAD_DIM)
        v_source = value + row * v_row_stride + column * v_token_stride + kv_heads * v_head_stride
        v_x = tl.load(v_source + dims * v_dim_stride, mask=v_mask, other=0.0)
        tl.store(target + kv_stride + dims, _converted(v_x, v_factor, dtype, LIMIT), mask=v_mask)

        if CLEARS:
            is_end = token + 1 == num_tokens
            after = tl.load(table_rows + token + 1, mask=token + 1 < num_tokens, other=-1)
            if (is_end | (after != table_row)) & (token < clear_before):
                all_dims = tl.arange(0, DIM_BLOCK)[None, :]
                for behind in range(slot % PAGE_SIZE + 1, PAGE_SIZE):
                    spot = target + (behind - slot % PAGE_SIZE) * slot_stride + all_dims
                    nothing = tl.zeros((HEAD_BLOCK, DIM_BLOCK), dtype)
                    tl.store(spot, nothing, mask=(kv_heads < num_kv_heads) & (all_dims < HEAD_DIM))
                    tl.store(
                        spot + kv_stride, nothing, mask=(kv_heads < num_kv_heads) & (all_dims < V_HEAD_DIM)
                    )
