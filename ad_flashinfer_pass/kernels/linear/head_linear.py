"""``attention.absorbing.head_linear`` of few tokens: a Triton kernel that reads each weight once.

A program has some columns of the result of one head, for all tokens; one more copies what stands beside them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 8192
"""Elements of the weight that a program reads at once."""


def run(x: Tensor, weight: Tensor, rest: Tensor | None) -> Tensor:
    """See ``attention.absorbing``; x [tokens, heads, depth], of at most 64 tokens."""
    (tokens, heads, depth), rows = x.shape, weight.shape[2]
    beside = 0 if rest is None else rest.shape[2]
    out = torch.empty((tokens, heads, rows + beside), dtype=x.dtype, device=x.device)
    depth_block = min(512, max(16, triton.next_power_of_2(depth)))
    block = min(max(16, triton.next_power_of_2(rows)), max(16, _TILE // depth_block))
    blocks = triton.cdiv(rows, block)
    _head_linear[(heads, blocks + (rest is not None))](
        x,
        weight,
        x if rest is None else rest,
        out,
        tokens,
        *x.stride(),
        *weight.stride(),
        *(x if rest is None else rest).stride(),
        HEADS=heads,
        DEPTH=depth,
        ROWS=rows,
        REST=beside,
        BLOCKS=blocks,
        TOKENS=max(16, triton.next_power_of_2(tokens)),
        DEPTH_BLOCK=depth_block,
        BLOCK=block,
        REST_BLOCK=triton.next_power_of_2(max(1, beside)),
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _head_linear(  # type: ignore[no-untyped-def]
    x,
    weight,
    rest,
    out,
    tokens,
    x_token,
    x_head,
    x_dim,
    weight_head,
    weight_depth,
    weight_row,
    rest_token,
    rest_head,
    rest_dim,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    REST: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    head, block = tl.program_id(0), tl.program_id(1)
    token = tl.arange(0, TOKENS)[:, None]
    is_token = token < tokens
    place = out + (token.to(tl.int64) * HEADS + head) * (ROWS + REST)
    if block == BLOCKS:
        column = tl.arange(0, REST_BLOCK)[None, :]
        mask = is_token & (column < REST)
        found = tl.load(
            rest + token * rest_token + head * rest_head + column * rest_dim, mask=mask, other=0.0
        )
        tl.store(place + ROWS + column, found, mask=mask)
        return
    row = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    x += token * x_token + head * x_head
    weight += head.to(tl.int64) * weight_head + row * weight_row
    sums = tl.zeros((TOKENS, BLOCK), tl.float32)
    for first in tl.static_range(0, DEPTH, DEPTH_BLOCK):
        depth = first + tl.arange(0, DEPTH_BLOCK)
        values = tl.load(x + depth[None, :] * x_dim, mask=is_token & (depth[None, :] < DEPTH), other=0.0)
        factors = tl.load(
            weight + depth[:, None] * weight_depth, mask=(depth[:, None] < DEPTH) & (row < ROWS), other=0.0
        )
        sums = tl.dot(values, factors, sums)
    tl.store(place + row, sums.to(out.dtype.element_ty), mask=is_token & (row < ROWS))
