"""Append to the pages as one Triton kernel: K and V of all tokens in one launch.

Any strides in, any strides of page, head and token out, divided by a scale and converted on the way. Numbers
beyond the range of an 8-bit float are clamped to it, NaN stays NaN. Slot 0 takes what padding tokens hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048
"""Elements of K, and of V, that one program moves, at most, unless one head is larger."""


def append(
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """See ``ops.append_kv``."""
    (_, tokens_per_row, num_heads, head_dim), v_head_dim = key.shape, value.shape[-1]
    num_tokens, dim_block = slot_mapping.shape[0], triton.next_power_of_2(max(head_dim, v_head_dim))
    head_block = min(triton.next_power_of_2(num_heads), max(1, _TILE // dim_block))
    limit = torch.finfo(kv_cache.dtype).max if kv_cache.dtype.itemsize == 1 else None
    _append[(num_tokens, triton.cdiv(num_heads, head_block))](
        key,
        value,
        slot_mapping,
        kv_cache,
        tokens_per_row,
        num_heads,
        1.0 / k_scale,
        1.0 / v_scale,
        *key.stride(),
        *value.stride(),
        *kv_cache.stride()[:4],
        PAGE_SIZE=kv_cache.shape[3],
        HEAD_DIM=head_dim,
        V_HEAD_DIM=v_head_dim,
        HEAD_BLOCK=head_block,
        DIM_BLOCK=dim_block,
        HAS_V=kv_cache.shape[1] == 2,
        LIMIT=limit,
    )


@triton.jit(do_not_specialize=["tokens_per_row", "k_factor", "v_factor"])
def _append(  # type: ignore[no-untyped-def]
    key,
    value,
    slot_mapping,
    kv_cache,
    tokens_per_row,
    num_heads,
    k_factor,
    v_factor,
    key_row_stride,
    key_token_stride,
    key_head_stride,
    key_dim_stride,
    value_row_stride,
    value_token_stride,
    value_head_stride,
    value_dim_stride,
    page_stride,
    kv_stride,
    head_stride,
    slot_stride,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    HAS_V: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """One token and HEAD_BLOCK of its heads."""
    token = tl.program_id(0).to(tl.int64)
    row, column = token // tokens_per_row, token % tokens_per_row
    heads = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None].to(tl.int64)
    dims = tl.arange(0, DIM_BLOCK)[None, :]
    slot = tl.load(slot_mapping + token).to(tl.int64)
    place = (slot // PAGE_SIZE) * page_stride + (slot % PAGE_SIZE) * slot_stride
    target = kv_cache + place + heads * head_stride + dims

    key += row * key_row_stride + column * key_token_stride
    mask = (heads < num_heads) & (dims < HEAD_DIM)
    new = tl.load(key + heads * key_head_stride + dims * key_dim_stride, mask=mask, other=0.0)
    tl.store(target, _converted(new, k_factor, kv_cache.dtype.element_ty, LIMIT), mask=mask)

    if HAS_V:
        value += row * value_row_stride + column * value_token_stride
        mask = (heads < num_heads) & (dims < V_HEAD_DIM)
        new = tl.load(value + heads * value_head_stride + dims * value_dim_stride, mask=mask, other=0.0)
        tl.store(target + kv_stride, _converted(new, v_factor, kv_cache.dtype.element_ty, LIMIT), mask=mask)


@triton.jit
def _converted(x, factor, dtype: tl.constexpr, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    x = x.to(tl.float32) * factor
    if LIMIT is not None:
        x = tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)
