"""Experts of very few tokens: two launches that read the chosen experts' weights at the memory's speed.

Nothing is sorted: ``_up`` has programs for each pair of a token and one of its experts, ``_down`` for each
token, whose k experts it sums itself. Products are summed in float32 registers, without tensor cores. An
expert that two tokens chose is read twice, from the L2 cache if they run at about the same time. To set
``_down`` up while ``_up`` runs, and let it ask for its weights then, made both slower by a tenth on an H200.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ad_flashinfer_pass.kernels.experts.arguments import Experts
from ad_flashinfer_pass.kernels.experts.gate import activate


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


_MAX_TOKENS = 4
"""Beyond, tokens share too many experts; measured on an H200 with 128 experts of which a token has 8."""
_CANDIDATES = [(2, 1024, 4, 2, 512, 2), (1, 1024, 4, 2, 1024, 2)]


def candidates(num_tokens: int) -> list[Config]:
    """The configurations worth timing, the most promising first; none for more tokens than a few."""
    return [Config(*values) for values in _CANDIDATES] if num_tokens <= _MAX_TOKENS else []


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
    middle = new((num_tokens * top_k, x.width), dtype=x.down.weight.dtype)
    _up[(num_tokens * top_k, triton.cdiv(x.width, config.rows))](
        x.hidden_states,
        x.top_k_index,
        x.top_k_weights if x.weigh_input else None,
        x.gate.weight,
        x.gate.bias,
        None if x.up is None else x.up.weight,
        None if x.up is None else x.up.bias,
        middle,
        x.width,
        *x.gate.strides,
        x.alpha,
        x.beta,
        float("inf") if x.limit is None else x.limit,
        DEPTH=x.hidden_states.shape[1],
        TOP_K=top_k,
        ACTIVATION=x.activation,
        SCALED=x.alpha != 1.0,
        ROWS=config.rows,
        BLOCK=config.depth,
        num_warps=config.warps,
    )
    out = new((num_tokens, x.hidden))
    _down[(num_tokens, triton.cdiv(x.hidden, config.down_rows))](
        middle,
        x.top_k_index,
        None if x.weigh_input else x.top_k_weights,
        x.down.weight,
        x.down.bias,
        out,
        x.hidden,
        *x.down.strides,
        DEPTH=x.width,
        TOP_K=top_k,
        ROWS=config.down_rows,
        BLOCK=config.down_depth,
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
    out,
    num_rows,
    stride_expert,
    stride_row,
    stride_column,
    stride_bias_expert,
    stride_bias,
    alpha,
    beta,
    limit,
    DEPTH: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows of what stands between the projections, for a token and one of its experts."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(index + pair).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
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
    if token_weights is not None:
        scale = tl.load(token_weights + pair).to(tl.float32)
        total *= scale
        up *= scale
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
        scale = 1.0
        if token_weights is not None:
            scale = tl.load(token_weights + pair).to(tl.float32)
        offsets = expert * stride_expert + rows[:, None] * stride_row + lanes[None, :] * stride_column
        for start in tl.static_range(0, DEPTH, BLOCK):
            lane_mask = start + lanes < DEPTH
            mask = row_mask[:, None] & lane_mask[None, :]
            w = tl.load(
                weight + offsets + start * stride_column, mask=mask, other=0.0, eviction_policy="evict_first"
            )
            v = tl.load(x + pair * DEPTH + start + lanes, mask=lane_mask, other=0.0).to(tl.float32)
            sums += w.to(tl.float32) * (v * scale)[None, :]
        if bias is not None:
            place_of_bias = expert * stride_bias_expert + rows * stride_bias
            biases += scale * tl.load(bias + place_of_bias, mask=row_mask, other=0.0).to(tl.float32)
    total = tl.sum(sums, axis=1) + biases
    tl.store(out + token * num_rows + rows, total.to(out.dtype.element_ty), mask=row_mask)
