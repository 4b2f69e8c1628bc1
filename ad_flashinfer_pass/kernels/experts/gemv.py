"""Experts of very few tokens: two launches that read the chosen experts' weights at the memory's speed.

Nothing is sorted: ``_up`` has programs for each pair of a token and one of its experts, ``_down`` for each
token, whose k experts it sums itself. Products are summed in float32 registers, without tensor cores. An
expert that two tokens chose is read twice, from the L2 cache if they run at about the same time. To set
``_down`` up while ``_up`` runs, and let it ask for its weights then, made both slower by a tenth on an H200.

Float8 weights have loops of their own: half the bytes take as long, unless twice as many elements are asked
for at once, and a sum for each element leaves no registers for that. So a thread adds what it reads of a row,
which has one scale. For weights of 16 bits such loops were slower by a tenth.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ad_flashinfer_pass.kernels.experts.arguments import Experts
from ad_flashinfer_pass.kernels.experts.gate import activate
from ad_flashinfer_pass.kernels.linear import float8


class Config(NamedTuple):
    """A way to launch the kernels."""

    rows: int
    """Rows of the gate's weight that a program computes, and as many of up."""
    depth: int
    """Elements of a row that are read at once."""
    warps: int
    down_rows: int
    """As rows, of down."""
    down_depth: int
    down_warps: int


_SCALE_BLOCK = tl.constexpr(float8.BLOCK)
_CHUNK = tl.constexpr(8)
"""Elements that a thread reads at once, of weights and inputs alike, so that none have to change threads."""
_AT_ONCE = tl.constexpr(4)
"""Parts of a row, of as many elements as a program takes in turn, that are asked for at once."""
MAX_TOKENS = 4
"""Beyond, tokens share too many experts; measured on an H200 with 128 experts of which a token has 8."""
_CANDIDATES = [(2, 1024, 4, 2, 512, 2), (1, 1024, 4, 2, 1024, 2)]
_OF_8_BITS = [
    (2, 2048, 2, 4, 256, 4),
    (4, 1024, 2, 4, 256, 4),
    (8, 2048, 4, 8, 256, 4),
    (4, 2048, 4, 4, 256, 8),
]


def candidates(num_tokens: int, is_float8: bool = False) -> list[Config]:
    """The configurations worth timing, the most promising first; none for more tokens than a few."""
    found = _OF_8_BITS if is_float8 else _CANDIDATES
    return [Config(*values) for values in found] if num_tokens <= MAX_TOKENS else []


def run(x: Experts, config: Config) -> Tensor:
    """``ops.experts`` in two kernels.

    Args:
        x: the arguments, on a CUDA device.
        config: how they are launched.

    Returns:
        [t, hidden], in the dtype of hidden_states.
    """
    num_tokens, top_k = x.top_k_index.shape
    new = x.hidden_states.new_empty
    middle = new((num_tokens * top_k, x.width), dtype=x.dtype)
    _up[(num_tokens * top_k, triton.cdiv(x.width, config.rows))](
        x.hidden_states,
        x.top_k_index,
        x.top_k_weights if x.weigh_input else None,
        x.gate.weight,
        x.gate.bias,
        None if x.up is None else x.up.weight,
        None if x.up is None else x.up.bias,
        x.gate.scale,
        None if x.up is None else x.up.scale,
        middle,
        x.width,
        *x.gate.strides,
        *x.gate.scale_strides,
        x.alpha,
        x.beta,
        float("inf") if x.limit is None else x.limit,
        DEPTH=x.hidden_states.shape[1],
        TOP_K=top_k,
        ACTIVATION=x.activation,
        SCALED=x.alpha != 1.0,
        BY_BLOCKS=x.gate.is_by_blocks,
        ROWS=config.rows,
        BLOCK=config.depth,
        num_warps=config.warps,
    )
    out = new((num_tokens, x.hidden))
    grid = (num_tokens, triton.cdiv(x.hidden, config.down_rows))
    inputs = (middle, x.top_k_index, None if x.weigh_input else x.top_k_weights, x.down.weight, x.down.bias)
    sizes = {"DEPTH": x.width, "TOP_K": top_k, "ROWS": config.down_rows, "BLOCK": config.down_depth}
    if x.down.scale is None:
        _down[grid](*inputs, out, x.hidden, *x.down.strides, **sizes, num_warps=config.down_warps)
        return out
    _down_float8[grid](
        *inputs,
        x.down.scale,
        out,
        x.hidden,
        *x.down.strides,
        *x.down.scale_strides,
        PLACES=triton.next_power_of_2(top_k),
        BY_BLOCKS=x.down.is_by_blocks,
        **sizes,
        num_warps=config.down_warps,
    )
    return out


@triton.jit
def _up(  # type: ignore[no-untyped-def]
    x,
    index,
    token_weights,
    weight,
    bias,
    up_weight,
    up_bias,
    scale,
    up_scale,
    out,
    num_rows,
    stride_expert,
    stride_row,
    stride_column,
    stride_bias_expert,
    stride_bias,
    stride_scale_expert,
    stride_scale_row,
    alpha,
    beta,
    limit,
    DEPTH: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    BY_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows of what stands between the projections, for a token and one of its experts."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(index + pair).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    scales = expert * stride_scale_expert
    scales += (tl.program_id(1) * ROWS // _SCALE_BLOCK if BY_BLOCKS else rows) * stride_scale_row
    if scale is None:
        lanes = tl.arange(0, BLOCK)
        offsets = expert * stride_expert + rows[:, None] * stride_row + lanes[None, :] * stride_column
        sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        ups = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for start in range(0, DEPTH, BLOCK):
            lane_mask = start + lanes < DEPTH
            mask = row_mask[:, None] & lane_mask[None, :]
            place = offsets + start * stride_column
            w = tl.load(weight + place, mask=mask, other=0.0, eviction_policy="evict_first")
            v = tl.load(x + (pair // TOP_K) * DEPTH + start + lanes, mask=lane_mask, other=0.0).to(tl.float32)
            sums += w.to(tl.float32) * v[None, :]
            if up_weight is not None:
                w = tl.load(up_weight + place, mask=mask, other=0.0, eviction_policy="evict_first")
                ups += w.to(tl.float32) * v[None, :]
        total, up = tl.sum(sums, axis=1), tl.sum(ups, axis=1)
    else:
        TURNS: tl.constexpr = (DEPTH + BLOCK - 1) // BLOCK
        chunks = tl.arange(0, BLOCK // _CHUNK) * _CHUNK
        lanes = chunks[:, None] + tl.arange(0, _CHUNK)[None, :]
        # Threads lie along the chunks, which come first for that; each keeps all rows of its own.
        offsets = (
            expert * stride_expert + rows[None, :, None] * stride_row + lanes[:, None, :] * stride_column
        )
        inputs = x + (pair // TOP_K) * DEPTH + lanes
        sums = tl.zeros((BLOCK // _CHUNK, ROWS), dtype=tl.float32)
        ups = tl.zeros((BLOCK // _CHUNK, ROWS), dtype=tl.float32)
        for start in tl.range(0, DEPTH, BLOCK, loop_unroll_factor=TURNS if TURNS <= _AT_ONCE else 1):
            lane_mask = start + lanes < DEPTH
            mask = row_mask[None, :, None] & lane_mask[:, None, :]
            place = offsets + start * stride_column
            w = tl.load(weight + place, mask=mask, other=0.0, eviction_policy="evict_first")
            if up_weight is not None:
                up_w = tl.load(up_weight + place, mask=mask, other=0.0, eviction_policy="evict_first")
            v = tl.load(inputs + start, mask=lane_mask, other=0.0).to(tl.float32)[:, None, :]
            if BY_BLOCKS:
                block_scales = scales + (start + chunks) // _SCALE_BLOCK
                in_depth = start + chunks < DEPTH
                factors = tl.load(scale + block_scales, mask=in_depth, other=0.0).to(tl.float32)
                if up_weight is not None:
                    up_factors = tl.load(up_scale + block_scales, mask=in_depth, other=0.0).to(tl.float32)
            part = tl.sum(w.to(tl.float32) * v, axis=2)
            sums += part * factors[:, None] if BY_BLOCKS else part
            if up_weight is not None:
                part = tl.sum(up_w.to(tl.float32) * v, axis=2)
                ups += part * up_factors[:, None] if BY_BLOCKS else part
        total, up = tl.sum(sums, axis=0), tl.sum(ups, axis=0)
    if scale is not None and not BY_BLOCKS:
        total *= tl.load(scale + scales, mask=row_mask, other=0.0).to(tl.float32)
        if up_weight is not None:
            up *= tl.load(up_scale + scales, mask=row_mask, other=0.0).to(tl.float32)
    if token_weights is not None:
        factor = tl.load(token_weights + pair).to(tl.float32)
        total *= factor
        up *= factor
    biases = expert * stride_bias_expert + rows * stride_bias
    if bias is not None:
        total += tl.load(bias + biases, mask=row_mask, other=0.0).to(tl.float32)
    if up_bias is not None:
        up += tl.load(up_bias + biases, mask=row_mask, other=0.0).to(tl.float32)
    total = activate(total, up, alpha, beta, limit, ACTIVATION, SCALED, up_weight is not None)
    tl.store(out + pair * num_rows + rows, total.to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def _down(  # type: ignore[no-untyped-def]
    x,
    index,
    token_weights,
    weight,
    bias,
    out,
    num_rows,
    stride_expert,
    stride_row,
    stride_column,
    stride_bias_expert,
    stride_bias,
    DEPTH: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS elements of a token's result."""
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    biases = tl.zeros((ROWS,), dtype=tl.float32)
    for place in tl.static_range(TOP_K):
        pair = token * TOP_K + place
        expert = tl.load(index + pair).to(tl.int64)
        factor = 1.0
        if token_weights is not None:
            factor = tl.load(token_weights + pair).to(tl.float32)
        offsets = expert * stride_expert + rows[:, None] * stride_row + lanes[None, :] * stride_column
        for start in tl.static_range(0, DEPTH, BLOCK):
            lane_mask = start + lanes < DEPTH
            mask = row_mask[:, None] & lane_mask[None, :]
            w = tl.load(
                weight + offsets + start * stride_column, mask=mask, other=0.0, eviction_policy="evict_first"
            )
            v = tl.load(x + pair * DEPTH + start + lanes, mask=lane_mask, other=0.0).to(tl.float32)
            sums += w.to(tl.float32) * (v * factor)[None, :]
        if bias is not None:
            place_of_bias = expert * stride_bias_expert + rows * stride_bias
            biases += factor * tl.load(bias + place_of_bias, mask=row_mask, other=0.0).to(tl.float32)
    total = tl.sum(sums, axis=1) + biases
    tl.store(out + token * num_rows + rows, total.to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def _down_float8(  # type: ignore[no-untyped-def]
    x,
    index,
    token_weights,
    weight,
    bias,
    scale,
    out,
    num_rows,
    stride_expert,
    stride_row,
    stride_column,
    stride_bias_expert,
    stride_bias,
    stride_scale_expert,
    stride_scale_row,
    DEPTH: tl.constexpr,
    TOP_K: tl.constexpr,
    PLACES: tl.constexpr,
    BY_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``_down`` of float8 weights: all experts of the token at once."""
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    TURNS: tl.constexpr = min((DEPTH + BLOCK - 1) // BLOCK, _AT_ONCE)
    chunks = tl.arange(0, BLOCK // _CHUNK) * _CHUNK
    lanes = chunks[:, None] + tl.arange(0, _CHUNK)[None, :]
    places = tl.arange(0, PLACES)
    is_place = places < TOP_K
    pairs = token * TOP_K + places
    expert = tl.load(index + pairs, mask=is_place, other=0).to(tl.int64)
    # Threads lie along the chunks, then along the places; each keeps all rows of its own.
    offsets = (expert * stride_expert)[:, None] + (rows * stride_row)[None, :]
    offsets = offsets[None, :, :, None] + lanes[:, None, None, :] * stride_column
    inputs = x + (pairs * DEPTH)[None, :, None] + lanes[:, None, :]
    scales = expert * stride_scale_expert
    sums = tl.zeros((BLOCK // _CHUNK, PLACES, ROWS), dtype=tl.float32)
    for first in range(0, DEPTH, TURNS * BLOCK):
        parts = ()
        for turn in tl.static_range(TURNS):
            in_depth = is_place[None, :, None] & (first + turn * BLOCK + lanes < DEPTH)[:, None, :]
            mask = row_mask[None, None, :, None] & in_depth[:, :, None, :]
            w = weight + offsets + (first + turn * BLOCK) * stride_column
            part = tl.load(w, mask=mask, other=0.0, eviction_policy="evict_first")
            parts += (part,)  # type: ignore[assignment]
        for turn in tl.static_range(TURNS):
            start = first + turn * BLOCK
            in_depth = is_place[None, :, None] & (start + lanes < DEPTH)[:, None, :]
            v = tl.load(inputs + start, mask=in_depth, other=0.0).to(tl.float32)
            part = tl.sum(parts[turn].to(tl.float32) * v[:, :, None, :], axis=3)
            if BY_BLOCKS:
                block = tl.program_id(1) * ROWS // _SCALE_BLOCK * stride_scale_row
                block_scales = scales[None, :] + (block + (start + chunks) // _SCALE_BLOCK)[:, None]
                in_depth = is_place[None, :] & (start + chunks < DEPTH)[:, None]
                part *= tl.load(scale + block_scales, mask=in_depth, other=0.0).to(tl.float32)[:, :, None]
            sums += part
    results = tl.sum(sums, axis=0)
    results_mask = is_place[:, None] & row_mask[None, :]
    if not BY_BLOCKS:
        row_scales = scales[:, None] + (rows * stride_scale_row)[None, :]
        results *= tl.load(scale + row_scales, mask=results_mask, other=0.0).to(tl.float32)
    if bias is not None:
        biases = (expert * stride_bias_expert)[:, None] + (rows * stride_bias)[None, :]
        results += tl.load(bias + biases, mask=results_mask, other=0.0).to(tl.float32)
    if token_weights is not None:
        results *= tl.load(token_weights + pairs, mask=is_place, other=0.0).to(tl.float32)[:, None]
    total = tl.sum(results, axis=0)
    tl.store(out + token * num_rows + rows, total.to(out.dtype.element_ty), mask=row_mask)
