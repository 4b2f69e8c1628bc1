"""Experts in Triton, for any number of tokens: all that goes to one expert is multiplied together.

Four launches of a fixed size, of which none waits for the host, so that a CUDA graph can hold them:

- ``_route``: a program for each expert lists the pairs (token, place in its top k) that chose it; the last to
  finish cuts the lists into blocks.
- ``_product``, twice: a program for each block and tile of rows reads its part of an expert's weights once,
  for all tokens of the block. First gate, up and what stands between, then down.
- ``_sum``: the k results of a token, weighted and added in one order, in float32.

The weight's rows are the M of the tensor cores' product, the tokens its N, so that few tokens waste little.

Float8 weights multiply activations of 16 bits (W8A16), or in float8 (W8A8): ``_quantize`` rounds the tokens,
and what stands between the products if the first of them does not hold all that shares a scale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ad_flashinfer_pass.kernels import overlap, workspaces
from ad_flashinfer_pass.kernels.experts.arguments import Experts, Projection
from ad_flashinfer_pass.kernels.experts.gate import NAN, activate
from ad_flashinfer_pass.kernels.linear import float8
from ad_flashinfer_pass.kernels.overlap import await_turn

_SCALE_BLOCK = tl.constexpr(float8.BLOCK)
_LARGEST = tl.constexpr(float8.LARGEST)
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


# Of W8A8.
_W8A8 = {
    16: [(16, 128, 128, 4, 3, 128, 128), (16, 64, 128, 4, 4, 64, 128), (16, 64, 128, 4, 3, 128, 128)],
    32: [(32, 128, 128, 4, 3, 128, 128), (16, 128, 128, 4, 3, 128, 128)],
    64: [(64, 128, 128, 8, 4, 128, 128), (64, 64, 128, 4, 3, 128, 128)],
    128: [(64, 64, 128, 4, 3, 128, 128), (128, 128, 128, 8, 3, 128, 128)],
}


def candidates(
    per_expert: float, device: torch.device, by_blocks: bool = False, is_w8a8: bool = False
) -> list[Config]:
    """The configurations worth timing, the most promising first.

    Args:
        per_expert: mean number of tokens that an expert gets.
        device: where they run; stages are as many as its shared memory holds.
        by_blocks: each block of a weight has a scale, so that a program's rows must lie in one.
        is_w8a8: weights and activations are float8.
    """
    of_blocks = _W8A8 if is_w8a8 else _CANDIDATES
    block = next((block for block in of_blocks if per_expert <= block), 128)
    near = [block, *(other for other in of_blocks if other in (block // 2, 2 * block))]
    found = [Config(*values) for size in near for values in of_blocks[size]]
    if by_blocks and not is_w8a8:
        found = [config._replace(down_rows=min(config.down_rows, float8.BLOCK)) for config in found]
    if device.type != "cuda":
        return found
    properties: Any = torch.cuda.get_device_properties(device)
    shared: int = properties.shared_memory_per_block_optin
    size = 1 if is_w8a8 else 2
    return [
        config._replace(stages=min(config.stages, shared // _bytes_of_stage(config, size)))
        for config in found
    ]


def _bytes_of_stage(config: Config, size: int = 2) -> int:
    """Of weights and inputs of so many bytes each, at most: gate and up, or down."""
    up, down = config.tokens + 2 * config.rows, config.tokens + config.down_rows
    return size * max(up * config.depth, down * config.down_depth)


def run(x: Experts, config: Config, is_w8a8: bool = False) -> Tensor:
    """``ops.experts`` in four kernels, or up to six.

    Args:
        x: the arguments; on a CUDA device.
        config: how they are launched.
        is_w8a8: activations are quantized as the arguments say.

    Returns:
        [t, hidden], in the dtype of hidden_states.
    """
    num_tokens, top_k = x.top_k_index.shape
    num_pairs, num_experts = num_tokens * top_k, x.down.weight.shape[0]
    device = x.hidden_states.device
    routes = routed(x.top_k_index, num_experts, config.tokens)
    rows, middle = (
        _Rows(x.hidden_states),
        _Rows(torch.empty((num_pairs, x.width), dtype=x.dtype, device=device)),
    )
    if is_w8a8:
        rows = _quantized(x.hidden_states, x, x.gate.input_scale)
        if x.quantization == "block" and config.rows == float8.BLOCK:
            middle = _Rows.like(middle.values, float8.BLOCK)
    _multiply(rows, x.gate, x, routes, middle, config.rows, config.depth, config)
    if is_w8a8 and middle.scale is None:
        middle = _quantized(middle.values, x, x.down.input_scale)
    partial = torch.empty((num_pairs, x.hidden), dtype=x.dtype, device=device)
    _multiply(middle, x.down, None, routes, _Rows(partial), config.down_rows, config.down_depth, config)
    return summed(partial, x)


def summed(partial: Tensor, x: Experts) -> Tensor:
    """The results of pairs [t * k, hidden], weighted unless inputs were, by token: [t, hidden]."""
    num_tokens, top_k = x.top_k_index.shape
    out = torch.empty_like(x.hidden_states)
    _sum[(num_tokens, triton.cdiv(x.hidden, _COLUMNS))](
        partial,
        None if x.weigh_input else x.top_k_weights,
        out,
        x.hidden,
        TOP_K=top_k,
        PLACES=triton.next_power_of_2(top_k),
        COLUMNS=_COLUMNS,
        num_warps=1,
        **overlap.options(out.device, num_tokens),
    )
    return out


class _Rows(NamedTuple):
    """What a product multiplies, or its result."""

    values: Tensor
    """[tokens or pairs, columns]."""
    scale: Tensor | None = None
    """float32 [as many, groups], of float8 values."""

    @staticmethod
    def like(x: Tensor, group: int, num_rows: int | None = None) -> _Rows:
        """For float8 of the columns of x, of which so many have a scale."""
        rows, new = x.shape[0] if num_rows is None else num_rows, x.new_empty
        values = new((rows, x.shape[1]), dtype=torch.float8_e4m3fn)
        return _Rows(values, new((rows, triton.cdiv(x.shape[1], group)), dtype=torch.float32))


def _quantized(rows: Tensor, x: Experts, input_scale: Tensor | None) -> _Rows:
    """Of tokens or pairs, as ``ops.quantized_experts`` has it; pairs, if each expert has a scale."""
    (num_rows, depth), num_pairs = rows.shape, x.top_k_index.numel()
    num_out = num_rows if input_scale is None else num_pairs
    out = _Rows.like(rows, float8.BLOCK if x.quantization == "block" else depth, num_out)
    groups = triton.next_power_of_2(triton.cdiv(depth, float8.BLOCK))
    _quantize[(num_out,)](
        rows,
        x.top_k_index,
        x.top_k_weights if x.weigh_input and rows is x.hidden_states and input_scale is not None else None,
        input_scale,
        *out,
        depth,
        ROWS_PER_ROW=num_out // num_rows,
        BY_GROUPS=x.quantization == "block",
        GROUPS=groups,
        num_warps=min(8, max(1, groups // 4)),
        **overlap.options(rows.device, len(x.top_k_index)),
    )
    return out


class Routes(NamedTuple):
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


def routed(index: Tensor, num_experts: int, block: int) -> Routes:
    """The pairs [t, k] of experts, in blocks of at most so many."""
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
    return Routes(pairs, ranges.view(2, num_experts), blocks.view(2, most_blocks))


def _multiply(
    x: _Rows,
    projection: Projection,
    gate: Experts | None,
    routes: Routes,
    out: _Rows,
    rows: int,
    depth: int,
    config: Config,
) -> None:
    """out[pair] = its row of x by its expert's weight."""
    (num_pairs, num_rows), num_columns = out.values.shape, x.values.shape[1]
    num_experts, num_blocks = routes.ranges.shape[1], routes.blocks.shape[1]
    up = None if gate is None else gate.up
    if gate is None and projection.is_by_blocks and rows == 2 * float8.BLOCK:
        rows //= 2
        projection, up = _in_pairs(projection)
    is_weighed = x.scale is not None and projection.input_scale is not None
    tile = rows if gate is not None or up is None else 2 * rows
    _product[(triton.cdiv(num_rows, tile), num_blocks)](
        x.values,
        projection.weight,
        projection.bias,
        None if up is None else up.weight,
        None if up is None else up.bias,
        projection.scale,
        None if up is None else up.scale,
        x.scale,
        gate.top_k_weights if gate is not None and gate.weigh_input and not is_weighed else None,
        routes.pairs,
        routes.ranges,
        routes.blocks,
        *out,
        num_experts,
        num_blocks,
        num_rows,
        *projection.strides,
        *projection.scale_strides,
        1.0 if gate is None else gate.alpha,
        0.0 if gate is None else gate.beta,
        float("inf") if gate is None or gate.limit is None else gate.limit,
        DEPTH=num_columns,
        PAIRS_PER_ROW=num_pairs // len(x.values),
        ACTIVATION="" if gate is None else gate.activation,
        SCALED=gate is not None and gate.alpha != 1.0,
        BY_BLOCKS=projection.is_by_blocks,
        X_GROUPS=1 if x.scale is None else x.scale.shape[1],
        ROWS=rows,
        TOKENS=config.tokens,
        BLOCK=depth,
        TOKENS_FIRST=config.tokens >= _TOKENS_FIRST,
        num_warps=config.warps,
        num_stages=config.stages,
        **overlap.options(x.values.device, len(x.values)),
    )


def _in_pairs(projection: Projection) -> tuple[Projection, Projection | None]:
    """Twice the same, the second a block of rows later; None if blocks are odd in number."""
    weight, bias, scale, *_ = projection
    if scale is None or scale.shape[1] % 2:
        return projection, None
    weight, bias = weight[:, float8.BLOCK :], None if bias is None else bias[:, float8.BLOCK :]
    return projection, Projection(weight, bias, scale[:, 1:])


@triton.jit
def _to_float8(v, scale):  # type: ignore[no-untyped-def]
    v *= tl.div_rn(1.0, scale)
    v = tl.maximum(tl.minimum(v, _LARGEST, propagate_nan=NAN), -_LARGEST, propagate_nan=NAN)
    return v.to(tl.float8e4nv)


@triton.jit
def _scale_of(largest):  # type: ignore[no-untyped-def]
    """Whose reciprocal is a number, too."""
    return tl.div_rn(tl.maximum(largest, 1e-30), _LARGEST)


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x,
    index,
    token_weights,
    input_scale,
    values,
    scales,
    depth,
    ROWS_PER_ROW: tl.constexpr,
    BY_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A row in float8; its scale is its expert's, or of its largest magnitude, or each group has one."""
    await_turn(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    columns = groups[:, None] * _SCALE_BLOCK + tl.arange(0, _SCALE_BLOCK)[None, :]
    mask = columns < depth
    v = tl.load(x + (row // ROWS_PER_ROW) * depth + columns, mask=mask, other=0.0).to(tl.float32)
    if token_weights is not None:
        v *= tl.load(token_weights + row).to(tl.float32)
    places = values + row * depth + columns
    if BY_GROUPS:
        num_groups = tl.cdiv(depth, _SCALE_BLOCK)
        scale = _scale_of(tl.max(tl.abs(v), axis=1))
        tl.store(scales + row * num_groups + groups, scale, mask=groups < num_groups)
        tl.store(places, _to_float8(v, scale[:, None]), mask=mask)
    else:
        if input_scale is not None:
            scale = tl.load(input_scale + tl.load(index + row)).to(tl.float32)
        else:
            scale = _scale_of(tl.max(tl.max(tl.abs(v), axis=1), axis=0))
        tl.store(scales + row, scale)
        tl.store(places, _to_float8(v, scale), mask=mask)


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
    x_scale,
    token_weights,
    lists,
    ranges,
    blocks,
    out,
    out_scale,
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
    X_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS_FIRST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """ROWS rows of the result for the tokens of a block; without an activation, of up_weight as many more."""
    await_turn(OVERLAPS)
    number = tl.program_id(1)
    expert = tl.load(blocks + number).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(ranges + expert) + tl.load(blocks + num_blocks + number) * TOKENS
    places = first + tl.arange(0, TOKENS)
    token_mask = places < tl.load(ranges + num_experts + expert)
    pairs = tl.load(lists + places, mask=token_mask, other=0).to(tl.int64)
    IS_PAIR: tl.constexpr = ACTIVATION == "" and up_weight is not None
    first_row = tl.program_id(0) * (2 * ROWS if IS_PAIR else ROWS)
    rows = first_row + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    up_mask = rows + ROWS < num_rows if IS_PAIR else row_mask
    lanes = tl.arange(0, BLOCK)
    offsets = expert * stride_expert + rows[:, None] * stride_row + lanes[None, :] * stride_column
    inputs = x + (pairs // PAIRS_PER_ROW)[:, None] * DEPTH + lanes[None, :]
    scales = expert * stride_scale_expert
    scales += (first_row // _SCALE_BLOCK if BY_BLOCKS else rows) * stride_scale_row
    sums = tl.zeros((TOKENS, ROWS) if TOKENS_FIRST else (ROWS, TOKENS), dtype=tl.float32)
    ups = tl.zeros_like(sums)
    BY_PARTS: tl.constexpr = BY_BLOCKS or X_GROUPS > 1
    if x_scale is not None:
        x_scales = x_scale + (pairs // PAIRS_PER_ROW) * X_GROUPS
    for start in range(0, DEPTH, BLOCK):
        w_mask, v_mask = row_mask[:, None], token_mask[:, None]
        if DEPTH % BLOCK != 0:
            w_mask &= (start + lanes < DEPTH)[None, :]
            v_mask &= (start + lanes < DEPTH)[None, :]
        w = tl.load(weight + offsets + start * stride_column, mask=w_mask, other=0.0)
        v = tl.load(inputs + start, mask=v_mask, other=0.0)
        if scale is None:
            v = v.to(w.dtype)
        elif x_scale is None:
            w = w.to(v.dtype)  # exact
        if BY_PARTS:
            factors, up_factors = 1.0, 1.0
            if X_GROUPS > 1:
                factors = tl.load(x_scales + start // _SCALE_BLOCK, mask=token_mask, other=0.0)
                factors = factors[:, None] if TOKENS_FIRST else factors[None, :]
                up_factors = factors
            if BY_BLOCKS:
                factors *= tl.load(scale + scales + start // _SCALE_BLOCK).to(tl.float32)
                if up_weight is not None:
                    up_factors *= tl.load(up_scale + scales + start // _SCALE_BLOCK).to(tl.float32)
            part = tl.dot(v, w.T) if TOKENS_FIRST else tl.dot(w, v.T)
            sums += part * factors
        else:
            sums = tl.dot(v, w.T, sums) if TOKENS_FIRST else tl.dot(w, v.T, sums)
        if up_weight is not None:
            if IS_PAIR:
                w_mask = up_mask[:, None]
                if DEPTH % BLOCK != 0:
                    w_mask &= (start + lanes < DEPTH)[None, :]
            w = tl.load(up_weight + offsets + start * stride_column, mask=w_mask, other=0.0)
            if scale is not None and x_scale is None:
                w = w.to(v.dtype)
            if BY_PARTS:
                part = tl.dot(v, w.T) if TOKENS_FIRST else tl.dot(w, v.T)
                ups += part * up_factors
            else:
                ups = tl.dot(v, w.T, ups) if TOKENS_FIRST else tl.dot(w, v.T, ups)
    if not TOKENS_FIRST:
        sums, ups = sums.T, ups.T
    if scale is not None and not BY_BLOCKS:
        sums *= tl.load(scale + scales, mask=row_mask, other=0.0).to(tl.float32)[None, :]
        if up_weight is not None:
            ups *= tl.load(up_scale + scales, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    if x_scale is not None and X_GROUPS == 1:
        factors = tl.load(x_scales, mask=token_mask, other=0.0)[:, None]
        sums *= factors
        ups *= factors
    if token_weights is not None:
        factors = tl.load(token_weights + pairs, mask=token_mask, other=0.0).to(tl.float32)[:, None]
        sums *= factors
        ups *= factors
    biases = expert * stride_bias_expert + rows * stride_bias
    if bias is not None:
        sums += tl.load(bias + biases, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    if up_bias is not None:
        ups += tl.load(up_bias + biases, mask=up_mask, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "":
        sums = activate(sums, ups, alpha, beta, limit, ACTIVATION, SCALED, up_weight is not None)
    if out_scale is not None:
        result_scale = _scale_of(tl.max(tl.abs(sums), axis=1))
        places = pairs * tl.num_programs(0) + tl.program_id(0)
        tl.store(out_scale + places, result_scale, mask=token_mask)
        sums = _to_float8(sums, result_scale[:, None])
    targets = out + pairs[:, None] * num_rows + rows[None, :]
    tl.store(targets, sums.to(out.dtype.element_ty), mask=token_mask[:, None] & row_mask[None, :])
    if IS_PAIR:
        tl.store(targets + ROWS, ups.to(out.dtype.element_ty), mask=token_mask[:, None] & up_mask[None, :])


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
