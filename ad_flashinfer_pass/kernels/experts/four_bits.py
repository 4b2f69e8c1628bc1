"""Experts whose weights are of 4 bits: the launches of ``gemv`` and ``grouped``, with ``four_bit_sums``.

``gemv``: for each token and expert gate, up and what stands between, then for each token down, whose k
experts it sums. ``grouped``: the lists and the weighted sum are those of the module ``grouped``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ad_flashinfer_pass.kernels import overlap
from ad_flashinfer_pass.kernels.experts import gemv, grouped
from ad_flashinfer_pass.kernels.experts.arguments import Experts, Projection
from ad_flashinfer_pass.kernels.experts.gate import activate
from ad_flashinfer_pass.kernels.kernel_plan import Kernel
from ad_flashinfer_pass.kernels.linear import four_bits, small_gemm
from ad_flashinfer_pass.kernels.linear.four_bit_sums import by_halves, row_sums, tile_sums, words_at_once
from ad_flashinfer_pass.kernels.overlap import await_turn

_BLOCK = tl.constexpr(four_bits.BLOCK)
# Of some 40 that were timed on an H200 for gpt-oss-20b's, the best; of grouped ones the depth has no meaning.
_GEMV = [(4, 1024, 2, 4, 1024, 2), (8, 1024, 2, 8, 1024, 2), (4, 4096, 4, 4, 4096, 4), (8, 512, 2, 8, 512, 2)]
# Sums of a group are in registers of their own, so that tiles are smaller than those of other weights.
_GROUPED = {
    16: [(16, 64, 64, 4, 4, 64, 64), (16, 32, 64, 2, 4, 32, 64)],
    32: [(32, 64, 64, 4, 4, 64, 64)],
    64: [(64, 64, 64, 4, 4, 64, 64)],
}


def candidates(num_tokens: int, per_expert: float) -> list[Kernel]:
    """The kernels worth timing, the most promising first.

    Args:
        num_tokens: of a step.
        per_expert: mean number of tokens that an expert gets.
    """
    few = _GEMV if num_tokens <= gemv.MAX_TOKENS else []
    block = next((block for block in _GROUPED if per_expert <= block), 64)
    near = [block, *(other for other in _GROUPED if other in (block // 2, 2 * block))]
    return [
        *(Kernel("gemv", values) for values in few),
        *(Kernel("grouped", values) for size in near for values in _GROUPED[size]),
    ]


def run(x: Experts, kernel: Kernel) -> Tensor:
    """``ops.quantized_experts`` by a kernel of ``candidates``.

    Returns:
        [t, hidden], in the dtype of hidden_states.
    """
    if kernel.name == "gemv":
        return _run_gemv(x, gemv.Config(*kernel.options))
    return _run_grouped(x, grouped.Config(*kernel.options))


def _tensors(projection: Projection, bits: int) -> tuple[Tensor | None, ...]:
    """Weight in words of so many bits, bias, scale, zero point."""
    words = projection.weight.view({16: torch.int16, 32: torch.int32}[bits])
    return words, projection.bias, projection.scale, projection.zero_point


def _strides(projection: Projection, bits: int) -> tuple[int, ...]:
    """Of experts and rows: of the weight in words of so many bits, of the bias, of the scale."""
    weight, *bias = [stride * 8 // bits for stride in projection.weight.stride()[:2]], *projection.strides[3:]
    return (*weight, *bias, *projection.scale_strides)


def _apart(first: Tensor | None, second: Tensor | None) -> int:
    """Elements from one tensor to another, which may lie in other memory."""
    if first is None or second is None:
        return 0
    return (second.data_ptr() - first.data_ptr()) // first.itemsize


def _run_gemv(x: Experts, config: gemv.Config) -> Tensor:
    num_tokens, top_k = x.top_k_index.shape
    new, by_assembly = x.hidden_states.new_empty, x.hidden_states.device.type == "cuda"
    middle = new((num_tokens * top_k, x.width))
    _up[(num_tokens * top_k, triton.cdiv(x.width, config.rows))](
        x.hidden_states.view(torch.int32),
        x.top_k_index,
        x.top_k_weights if x.weigh_input else None,
        *_tensors(x.gate, 32),
        None if x.up is None else x.up.bias,
        middle,
        x.width,
        *_strides(x.gate, 32),
        _apart(x.gate.weight, x.up and x.up.weight) // 4,
        _apart(x.gate.scale, x.up and x.up.scale),
        _apart(x.gate.zero_point, x.up and x.up.zero_point),
        x.alpha,
        x.beta,
        float("inf") if x.limit is None else x.limit,
        DEPTH=x.hidden,
        TOP_K=top_k,
        ACTIVATION=x.activation,
        SCALED=x.alpha != 1.0,
        GATED=x.up is not None,
        GROUP=x.gate.group,
        BY_ASSEMBLY=by_assembly,
        ROWS=config.rows,
        BLOCK=config.depth,
        num_warps=config.warps,
    )
    out = new((num_tokens, x.hidden))
    _down[(num_tokens, triton.cdiv(x.hidden, config.down_rows))](
        middle.view(torch.int32),
        x.top_k_index,
        None if x.weigh_input else x.top_k_weights,
        *_tensors(x.down, 32),
        out,
        x.hidden,
        *_strides(x.down, 32),
        DEPTH=x.width,
        TOP_K=top_k,
        GROUP=x.down.group,
        BY_ASSEMBLY=by_assembly,
        ROWS=config.down_rows,
        BLOCK=config.down_depth,
        num_warps=config.down_warps,
    )
    return out


def _run_grouped(x: Experts, config: grouped.Config) -> Tensor:
    num_tokens, top_k = x.top_k_index.shape
    routes = grouped.routed(x.top_k_index, x.down.weight.shape[0], config.tokens)
    new = x.hidden_states.new_empty
    middle, partial = (new((num_tokens * top_k, columns)) for columns in (x.width, x.hidden))
    _multiply(x.hidden_states, x.gate, x, routes, middle, config.rows, config)
    _multiply(middle, x.down, None, routes, partial, config.down_rows, config)
    return grouped.summed(partial, x)


def _multiply(
    x: Tensor,
    projection: Projection,
    gate: Experts | None,
    routes: grouped.Routes,
    out: Tensor,
    rows: int,
    config: grouped.Config,
) -> None:
    """out[pair] = its row of x by its expert's weight."""
    num_experts, num_blocks = routes.ranges.shape[1], routes.blocks.shape[1]
    up, depth = None if gate is None else gate.up, projection.depth
    words = words_at_once(projection.group, depth)
    # Turns of the loop that are written out, where a turn is short.
    turns = next(n for n in (3, 2, 1) if n == 1 or (config.tokens == 16 and depth % (4 * words * n) == 0))
    block = 4 * words * turns
    bytes_of_stage = block * (2 * config.tokens + (1 if up is not None else 0.5) * rows)
    stages = min(config.stages, max(1, int(small_gemm.shared_bytes_of(x.device) // bytes_of_stage)))
    _product[(triton.cdiv(out.shape[1], rows), num_blocks)](
        x,
        *_tensors(projection, 16),
        *((None,) * 4 if up is None else _tensors(up, 16)),
        gate.top_k_weights if gate is not None and gate.weigh_input else None,
        routes.pairs,
        routes.ranges,
        routes.blocks,
        out,
        num_experts,
        num_blocks,
        out.shape[1],
        *_strides(projection, 16),
        1.0 if gate is None else gate.alpha,
        0.0 if gate is None else gate.beta,
        float("inf") if gate is None or gate.limit is None else gate.limit,
        DEPTH=depth,
        PAIRS_PER_ROW=len(out) // len(x),
        ACTIVATION="" if gate is None else gate.activation,
        SCALED=gate is not None and gate.alpha != 1.0,
        GROUP=projection.group,
        BLOCK=block,
        K=words,
        BY_ASSEMBLY=x.device.type == "cuda",
        ROWS=rows,
        TOKENS=config.tokens,
        num_warps=config.warps,
        num_stages=stages,
        **overlap.options(x.device, len(x)),
    )


@triton.jit
def _up(  # type: ignore[no-untyped-def]
    x,
    index,
    token_weights,
    weight,
    bias,
    scale,
    zero,
    up_bias,
    out,
    num_rows,
    stride_expert,
    stride_row,
    stride_bias_expert,
    stride_bias,
    stride_scale_expert,
    stride_scale_row,
    up_words,
    up_groups,
    up_zeros,
    alpha,
    beta,
    limit,
    DEPTH: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    BY_ASSEMBLY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows of what stands between the projections, for a token and one of its experts."""
    IS_BFLOAT16: tl.constexpr = out.dtype.element_ty == tl.bfloat16
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(index + pair).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    EACH: tl.constexpr = 2 if GATED else 1
    # Those of gate and up in turn.
    both = tl.arange(0, ROWS * EACH)
    its_rows, is_up = tl.program_id(1) * ROWS + both // EACH, both % EACH
    words = expert * stride_expert + its_rows * stride_row + is_up * up_words
    groups = expert * stride_scale_expert + its_rows * stride_scale_row
    sums, _ = row_sums(
        weight, words, scale, groups + is_up * up_groups, zero, groups + is_up * up_zeros,
        its_rows < num_rows, x + (pair // TOP_K) * (DEPTH // 2), None,
        DEPTH, ROWS * EACH, BLOCK, GROUP, IS_BFLOAT16, BY_ASSEMBLY,
    )  # fmt: skip
    if GATED:
        total, up = by_halves(sums, ROWS)
    else:
        total = tl.sum(sums, axis=1)
        up = total
    if token_weights is not None:
        factor = tl.load(token_weights + pair).to(tl.float32)
        total *= factor
        up *= factor
    biases = expert * stride_bias_expert + rows * stride_bias
    if bias is not None:
        total += tl.load(bias + biases, mask=row_mask, other=0.0).to(tl.float32)
    if up_bias is not None:
        up += tl.load(up_bias + biases, mask=row_mask, other=0.0).to(tl.float32)
    total = activate(total, up, alpha, beta, limit, ACTIVATION, SCALED, GATED)
    tl.store(out + pair * num_rows + rows, total.to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def _down(  # type: ignore[no-untyped-def]
    x,
    index,
    token_weights,
    weight,
    bias,
    scale,
    zero,
    out,
    num_rows,
    stride_expert,
    stride_row,
    stride_bias_expert,
    stride_bias,
    stride_scale_expert,
    stride_scale_row,
    DEPTH: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUP: tl.constexpr,
    BY_ASSEMBLY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS elements of a token's result."""
    IS_BFLOAT16: tl.constexpr = out.dtype.element_ty == tl.bfloat16
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    sums = tl.zeros((ROWS, BLOCK // _BLOCK), dtype=tl.float32)
    biases = tl.zeros((ROWS,), dtype=tl.float32)
    for place in tl.static_range(TOP_K):
        pair = token * TOP_K + place
        expert = tl.load(index + pair).to(tl.int64)
        words = expert * stride_expert + rows * stride_row
        groups = expert * stride_scale_expert + rows * stride_scale_row
        found, _ = row_sums(
            weight, words, scale, groups, zero, groups, row_mask, x + pair * (DEPTH // 2), None,
            DEPTH, ROWS, BLOCK, GROUP, IS_BFLOAT16, BY_ASSEMBLY,
        )  # fmt: skip
        factor = 1.0
        if token_weights is not None:
            factor = tl.load(token_weights + pair).to(tl.float32)
        sums += factor * found
        if bias is not None:
            place_of_bias = expert * stride_bias_expert + rows * stride_bias
            biases += factor * tl.load(bias + place_of_bias, mask=row_mask, other=0.0).to(tl.float32)
    total = tl.sum(sums, axis=1) + biases
    tl.store(out + token * num_rows + rows, total.to(out.dtype.element_ty), mask=row_mask)


@triton.jit(do_not_specialize=["num_blocks"])
def _product(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    scale,
    zero,
    up_weight,
    up_bias,
    up_scale,
    up_zero,
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
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    BY_ASSEMBLY: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
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
    words = expert * stride_expert + rows * stride_row
    groups = expert * stride_scale_expert + rows * stride_scale_row
    sums, ups = tile_sums(
        weight, up_weight, words, scale, up_scale, groups, zero, up_zero, row_mask,
        x, (pairs // PAIRS_PER_ROW) * DEPTH, token_mask, 0,
        DEPTH, ROWS, TOKENS, GROUP, BLOCK, K, up_weight is not None, BY_ASSEMBLY,
    )  # fmt: skip
    sums, ups = sums.T, ups.T
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
