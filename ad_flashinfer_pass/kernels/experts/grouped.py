"""Experts in Triton, for any number of tokens: all that goes to one expert is multiplied together.

Four launches of a fixed size, of which none waits for the host, so that a CUDA graph can hold them:

- ``_route``: a program for each expert lists the pairs (token, place in its top k) that chose it; the last to
  finish cuts the lists into blocks.
- ``_product``, twice: a program for each block and tile of rows reads its part of an expert's weights once,
  for all tokens of the block. First gate, up and what stands between, then down.
- ``_sum``: the k results of a token, weighted and added in one order, in float32.

The weight's rows are the M of the tensor cores' product, the tokens its N, so that few tokens waste little.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ad_flashinfer_pass.kernels import overlap, workspaces
from ad_flashinfer_pass.kernels.experts.arguments import Experts, Projection
from ad_flashinfer_pass.kernels.experts.gate import activate
from ad_flashinfer_pass.kernels.linear import float8
from ad_flashinfer_pass.kernels.overlap import await_turn

_SCALE_BLOCK = tl.constexpr(float8.BLOCK)
_PAIRS_AT_ONCE = 4096
_COLUMNS = 256
_TOKENS_FIRST = 64
"""Tokens of a block from which on they are the M of the product, whose result is then written in order."""


class Config(NamedTuple):
    """A way to launch the kernels."""

    tokens: int
    """Tokens of a block, at least 16."""
    rows: int
    """Rows of the gate's weight that a program computes, and as many of up."""
    depth: int
    """Elements of a row that are read at once."""
    warps: int
    stages: int
    down_rows: int
    """As rows, of down, with as many warps and stages."""
    down_depth: int


# Of 200 configurations that were timed on an H200 for 128 experts of 768 x 2048, the best for each block.
_CANDIDATES = {
    16: [(16, 64, 128, 4, 3, 128, 128), (16, 64, 64, 4, 5, 64, 128)],
    32: [(32, 64, 64, 4, 5, 128, 64)],
    64: [(64, 128, 64, 8, 4, 128, 64), (64, 128, 64, 4, 4, 128, 64)],
    128: [(128, 128, 64, 8, 4, 256, 64), (128, 64, 64, 4, 3, 128, 64)],
}


def candidates(per_expert: float, device: torch.device, by_blocks: bool = False) -> list[Config]:
    """The configurations worth timing, the most promising first.

    Args:
        per_expert: mean number of tokens that an expert gets.
        device: where they run; stages are as many as its shared memory holds.
        by_blocks: each block of a weight has a scale, so that a program's rows must lie in one.
    """
    block = next((block for block in _CANDIDATES if per_expert <= block), 128)
    near = [block, *(other for other in _CANDIDATES if other in (block // 2, 2 * block))]
    found = [Config(*values) for size in near for values in _CANDIDATES[size]]
    if by_blocks:
        found = [config._replace(down_rows=min(config.down_rows, float8.BLOCK)) for config in found]
    if device.type != "cuda":
        return found
    properties: Any = torch.cuda.get_device_properties(device)
    shared: int = properties.shared_memory_per_block_optin
    return [config._replace(stages=min(config.stages, shared // _bytes_of_stage(config))) for config in found]


def _bytes_of_stage(config: Config) -> int:
    """Of 2-byte weights and inputs, at most: gate and up, or down."""
    up, down = config.tokens + 2 * config.rows, config.tokens + config.down_rows
    return 2 * max(up * config.depth, down * config.down_depth)


def run(x: Experts, config: Config) -> Tensor:
    """``ops.experts`` in four kernels.

    Args:
        x: the arguments; on a CUDA device.
        config: how they are launched.

    Returns:
        [t, hidden], in the dtype of hidden_states.
    """
    num_tokens, top_k = x.top_k_index.shape
    num_pairs, num_experts = num_tokens * top_k, x.down.weight.shape[0]
    device = x.hidden_states.device
    routes = _routed(x.top_k_index, num_experts, config.tokens)
    middle = torch.empty((num_pairs, x.width), dtype=x.dtype, device=device)
    _multiply(x.hidden_states, top_k, x.gate, x, routes, middle, config.rows, config.depth, config)
    partial = torch.empty((num_pairs, x.hidden), dtype=x.dtype, device=device)
    _multiply(middle, 1, x.down, None, routes, partial, config.down_rows, config.down_depth, config)
    out = torch.empty((num_tokens, x.hidden), dtype=x.hidden_states.dtype, device=device)
    _sum[(num_tokens, triton.cdiv(x.hidden, _COLUMNS))](
        partial,
        None if x.weigh_input else x.top_k_weights,
        out,
        x.hidden,
        TOP_K=top_k,
        PLACES=triton.next_power_of_2(top_k),
        COLUMNS=_COLUMNS,
        num_warps=1,
        **overlap.options(device, num_tokens),
    )
    return out


class _Routes(NamedTuple):
    """What was sent where."""

    pairs: Tensor
    """int32 [t * k]: numbers of the pairs, expert after expert."""
    ranges: Tensor
    """int32 [2, num_experts]: where those of an expert begin and end."""
    blocks: Tensor
    """int32 [2, most blocks]: expert, and number among its blocks; -1 beyond the last block."""


def _counter(device: torch.device) -> Tensor:
    """Zero before and after each launch; for one stream at a time."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def _routed(index: Tensor, num_experts: int, block: int) -> _Routes:
    num_tokens, top_k = index.shape
    num_pairs = num_tokens * top_k
    # An expert's last block may be short, so there is one more for each that is chosen.
    most_blocks = min(num_experts, num_pairs) + num_pairs // block
    sizes = [num_pairs, 2 * num_experts, 2 * most_blocks]
    pairs, ranges, blocks = torch.empty(sum(sizes), dtype=torch.int32, device=index.device).split(sizes)
    _route[(num_experts,)](
        index,
        pairs,
        ranges,
        blocks,
        workspaces.get(_counter, index.device),
        num_pairs,
        most_blocks,
        EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK=block,
        PAIRS=min(_PAIRS_AT_ONCE, triton.next_power_of_2(num_pairs)),
        num_warps=8 if num_pairs >= _PAIRS_AT_ONCE else 4,
        **overlap.options(index.device, num_tokens),
    )
    return _Routes(pairs, ranges.view(2, num_experts), blocks.view(2, most_blocks))


def _multiply(
    x: Tensor,
    pairs_per_row: int,
    projection: Projection,
    gate: Experts | None,
    routes: _Routes,
    out: Tensor,
    rows: int,
    depth: int,
    config: Config,
) -> None:
    """out[pair] = x[pair // pairs_per_row] by its expert's weight."""
    num_rows, num_columns = out.shape[1], x.shape[1]
    num_experts, num_blocks = routes.ranges.shape[1], routes.blocks.shape[1]
    up = None if gate is None else gate.up
    _product[(triton.cdiv(num_rows, rows), num_blocks)](
        x,
        projection.weight,
        projection.bias,
        None if up is None else up.weight,
        None if up is None else up.bias,
        projection.scale,
        None if up is None else up.scale,
        gate.top_k_weights if gate is not None and gate.weigh_input else None,
        routes.pairs,
        routes.ranges,
        routes.blocks,
        out,
        num_experts,
        num_blocks,
        num_rows,
        *projection.strides,
        *projection.scale_strides,
        1.0 if gate is None else gate.alpha,
        0.0 if gate is None else gate.beta,
        float("inf") if gate is None or gate.limit is None else gate.limit,
        DEPTH=num_columns,
        PAIRS_PER_ROW=pairs_per_row,
        ACTIVATION="" if gate is None else gate.activation,
        SCALED=gate is not None and gate.alpha != 1.0,
        BY_BLOCKS=projection.is_by_blocks,
        ROWS=rows,
        TOKENS=config.tokens,
        BLOCK=depth,
        TOKENS_FIRST=config.tokens >= _TOKENS_FIRST,
        num_warps=config.warps,
        num_stages=config.stages,
        **overlap.options(x.device, x.shape[0]),
    )


@triton.jit(do_not_specialize=["num_pairs", "most_blocks"])
def _route(  # type: ignore[no-untyped-def]
    index,
    lists,
    ranges,
    blocks,
    done,
    num_pairs,
    most_blocks,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The pairs of one expert, in their order; by the last program the blocks of all."""
    await_turn(OVERLAPS)
    expert, num_experts = tl.program_id(0), tl.num_programs(0)
    first = 0
    for start in range(0, num_pairs, PAIRS):
        pairs = start + tl.arange(0, PAIRS)
        chosen = tl.load(index + pairs, mask=pairs < num_pairs, other=num_experts)
        first += tl.sum((chosen < expert).to(tl.int32), axis=0)
    end = first
    for start in range(0, num_pairs, PAIRS):
        pairs = start + tl.arange(0, PAIRS)
        is_here = tl.load(index + pairs, mask=pairs < num_pairs, other=num_experts) == expert
        places = tl.cumsum(is_here.to(tl.int32), axis=0) + (end - 1)
        tl.store(lists + places, pairs, mask=is_here)
        end += tl.sum(is_here.to(tl.int32), axis=0)
    tl.store(ranges + expert, first)
    tl.store(ranges + num_experts + expert, end)
    tl.debug_barrier()
    if tl.atomic_add(done, 1) == num_experts - 1:
        tl.store(done, 0)
        experts = tl.arange(0, EXPERTS)
        begins = tl.load(ranges + experts, mask=experts < num_experts, other=0, cache_modifier=".cg")
        ends = tl.load(
            ranges + num_experts + experts, mask=experts < num_experts, other=0, cache_modifier=".cg"
        )
        num_blocks = (ends - begins + BLOCK - 1) // BLOCK
        firsts = tl.cumsum(num_blocks, axis=0) - num_blocks
        total = tl.sum(num_blocks, axis=0)
        for number in range(0, tl.max(num_blocks, axis=0)):
            has_it = number < num_blocks
            tl.store(blocks + firsts + number, experts, mask=has_it)
            tl.store(blocks + most_blocks + firsts + number, tl.zeros_like(experts) + number, mask=has_it)
        for start in range(total, most_blocks, EXPERTS):
            tl.store(blocks + start + experts, -1, mask=start + experts < most_blocks)


@triton.jit(do_not_specialize=["num_blocks"])
def _product(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    up_weight,
    up_bias,
    scale,
    up_scale,
    token_weights,
    lists,
    ranges,
    blocks,
    out,
    num_experts,
    num_blocks,
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
    PAIRS_PER_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    BY_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS_FIRST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """ROWS rows of the result for the tokens of a block."""
    await_turn(OVERLAPS)
    number = tl.program_id(1)
    expert = tl.load(blocks + number).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(ranges + expert) + tl.load(blocks + num_blocks + number) * TOKENS
    places = first + tl.arange(0, TOKENS)
    token_mask = places < tl.load(ranges + num_experts + expert)
    pairs = tl.load(lists + places, mask=token_mask, other=0).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    lanes = tl.arange(0, BLOCK)
    offsets = expert * stride_expert + rows[:, None] * stride_row + lanes[None, :] * stride_column
    inputs = x + (pairs // PAIRS_PER_ROW)[:, None] * DEPTH + lanes[None, :]
    scales = expert * stride_scale_expert
    scales += (tl.program_id(0) * ROWS // _SCALE_BLOCK if BY_BLOCKS else rows) * stride_scale_row
    sums = tl.zeros((TOKENS, ROWS) if TOKENS_FIRST else (ROWS, TOKENS), dtype=tl.float32)
    ups = tl.zeros_like(sums)
    for start in range(0, DEPTH, BLOCK):
        w_mask, v_mask = row_mask[:, None], token_mask[:, None]
        if DEPTH % BLOCK != 0:
            w_mask &= (start + lanes < DEPTH)[None, :]
            v_mask &= (start + lanes < DEPTH)[None, :]
        w = tl.load(weight + offsets + start * stride_column, mask=w_mask, other=0.0)
        v = tl.load(inputs + start, mask=v_mask, other=0.0)
        if scale is None:
            v = v.to(w.dtype)
        else:
            w = w.to(v.dtype)  # exact
        if BY_BLOCKS:
            part = tl.dot(v, w.T) if TOKENS_FIRST else tl.dot(w, v.T)
            sums += part * tl.load(scale + scales + start // _SCALE_BLOCK).to(tl.float32)
        else:
            sums = tl.dot(v, w.T, sums) if TOKENS_FIRST else tl.dot(w, v.T, sums)
        if up_weight is not None:
            w = tl.load(up_weight + offsets + start * stride_column, mask=w_mask, other=0.0)
            if scale is not None:
                w = w.to(v.dtype)
            if BY_BLOCKS:
                part = tl.dot(v, w.T) if TOKENS_FIRST else tl.dot(w, v.T)
                ups += part * tl.load(up_scale + scales + start // _SCALE_BLOCK).to(tl.float32)
            else:
                ups = tl.dot(v, w.T, ups) if TOKENS_FIRST else tl.dot(w, v.T, ups)
    if not TOKENS_FIRST:
        sums, ups = sums.T, ups.T
    if scale is not None and not BY_BLOCKS:
        sums *= tl.load(scale + scales, mask=row_mask, other=0.0).to(tl.float32)[None, :]
        if up_weight is not None:
            ups *= tl.load(up_scale + scales, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    if token_weights is not None:
        factors = tl.load(token_weights + pairs, mask=token_mask, other=0.0).to(tl.float32)[:, None]
        sums *= factors
        ups *= factors
    biases = expert * stride_bias_expert + rows * stride_bias
    if bias is not None:
        sums += tl.load(bias + biases, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    if up_bias is not None:
        ups += tl.load(up_bias + biases, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "":
        sums = activate(sums, ups, alpha, beta, limit, ACTIVATION, SCALED, up_weight is not None)
    targets = out + pairs[:, None] * num_rows + rows[None, :]
    tl.store(targets, sums.to(out.dtype.element_ty), mask=token_mask[:, None] & row_mask[None, :])


@triton.jit
def _sum(  # type: ignore[no-untyped-def]
    partial,
    weights,
    out,
    num_columns,
    TOP_K: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """COLUMNS elements of a token's result; all parts are asked for at once."""
    await_turn(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    places = tl.arange(0, PLACES)
    mask = columns < num_columns
    pairs = token * TOP_K + places
    parts = partial + pairs[:, None] * num_columns + columns[None, :]
    values = tl.load(parts, mask=(places < TOP_K)[:, None] & mask[None, :], other=0.0).to(tl.float32)
    if weights is not None:
        values *= tl.load(weights + pairs, mask=places < TOP_K, other=0.0).to(tl.float32)[:, None]
    total = tl.sum(values, axis=0)
    tl.store(out + token * num_columns + columns, total.to(out.dtype.element_ty), mask=mask)
