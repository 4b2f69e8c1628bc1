"""Tokens of each sequence through its state, one after the other, as one Triton kernel for each op.

A state is read and written once, which is all that one token of each sequence needs; ``prefill`` has what is
faster for many. Padding rows, which have slot 0, neither read nor write it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NAN = tl.constexpr(tl.PropagateNan.ALL)
"""A time step that is not a number stays so, as by torch, and is not cut to a limit."""
_TILE = 4096
"""Elements of a state that one program holds, at most, unless one row of it is larger."""


def convolve(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    pool: Tensor,
    *rows: Tensor,
) -> None:
    """``ops.cached_causal_conv1d`` of one token each, to out [n, channels]; rows: slot_idx and input_pos."""
    x = _plain(x)
    block = min(1024, triton.next_power_of_2(x.shape[1]))
    with torch.cuda.device_of(x):
        _convolve[(x.shape[0], triton.cdiv(x.shape[1], block))](
            x,
            weight.contiguous(),
            bias,
            pool,
            *rows,
            out,
            x.stride(0),
            x.shape[1],
            WIDTH=weight.shape[1],
            SILU=activation == "silu",
            BLOCK=block,
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
    cu_seqlen: Tensor | None = None,
) -> None:
    """``ops.cached_gated_delta_rule`` or ``cached_kda``.

    Args:
        normalise: divide queries and keys by their norms.
        out: [tokens, num_heads, v_dim], written.
        query: [tokens, num_k_heads, k_dim]; for this and what follows see there.
        slot_idx: of each sequence, [n].
        input_pos: likewise.
        cu_seqlen: int32 [n + 1], the first token of each; None if each has one.
    """
    given = [_plain(x) for x in (query, key, value, g, beta)]
    (_, heads, v_dim), k_dim = value.shape, key.shape[2]
    k_block = triton.next_power_of_2(k_dim)
    v_block = min(triton.next_power_of_2(v_dim), max(1, _TILE // k_block))
    with torch.cuda.device_of(value):
        _delta_rule[(slot_idx.shape[0], heads, triton.cdiv(v_dim, v_block))](
            *given,
            pool,
            slot_idx,
            input_pos,
            cu_seqlen,
            out,
            *(stride for x in given for stride in x.stride()[:2]),
            k_dim**-0.5,
            GROUP=heads // key.shape[1],
            K_DIM=k_dim,
            V_DIM=v_dim,
            K_BLOCK=k_block,
            V_BLOCK=v_block,
            BY_ROW=g.dim() == 3,
            NORMALISE=normalise,
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
    cu_seqlen: Tensor | None = None,
) -> None:
    """``ops.cached_ssd_scan``; constants: A, D and dt_bias; the rest as in ``delta_rule``."""
    given = [_plain(x) for x in (hidden_states, dt, B, C)]
    (_, heads, head_dim), state = hidden_states.shape, B.shape[2]
    state_block = triton.next_power_of_2(state)
    block = min(triton.next_power_of_2(head_dim), max(1, _TILE // state_block))
    with torch.cuda.device_of(out):
        _ssd[(slot_idx.shape[0], heads, triton.cdiv(head_dim, block))](
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
            GROUP=heads // B.shape[1],
            DIM=head_dim,
            STATE=state,
            BLOCK=block,
            STATE_BLOCK=state_block,
            SOFTPLUS=softplus,
        )


def selective(
    constants: tuple[Tensor, Tensor | None, Tensor | None],
    softplus: bool,
    out: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    pool: Tensor,
    slot_idx: Tensor,
    input_pos: Tensor,
    cu_seqlen: Tensor | None = None,
) -> None:
    """``ops.cached_selective_scan``; constants: A, D and dt_bias; the rest as in ``delta_rule``."""
    given = [_plain(x) for x in (hidden_states, dt, B, C)]
    channels = hidden_states.shape[1]
    state_block = triton.next_power_of_2(B.shape[1])
    block = min(triton.next_power_of_2(channels), max(1, _TILE // 4 // state_block))
    with torch.cuda.device_of(out):
        _selective[(slot_idx.shape[0], triton.cdiv(channels, block))](
            *given,
            *(None if x is None else x.contiguous() for x in constants),
            pool,
            slot_idx,
            input_pos,
            cu_seqlen,
            out,
            *(x.stride(0) for x in given),
            channels,
            STATE=B.shape[1],
            BLOCK=block,
            STATE_BLOCK=state_block,
            SOFTPLUS=softplus,
        )


def _plain(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@triton.jit
def _convolve(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    pool,
    slot_idx,
    input_pos,
    out,
    x_stride,
    num_channels,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some channels of one sequence."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < num_channels
    slot = tl.load(slot_idx + row)
    state = pool + (slot * num_channels + channels) * (WIDTH - 1)
    is_known = channels < tl.where(tl.load(input_pos + row) > 0, num_channels, 0)
    is_kept = channels < tl.where(slot > 0, num_channels, 0)
    new = tl.load(x + row * x_stride + channels, mask=mask, other=0.0)
    total = new.to(tl.float32) * tl.load(weight + channels * WIDTH + WIDTH - 1, mask=mask).to(tl.float32)
    for at in tl.static_range(WIDTH - 1):
        old = tl.load(state + at, mask=is_known, other=0.0)
        total += old.to(tl.float32) * tl.load(weight + channels * WIDTH + at, mask=mask).to(tl.float32)
        if at > 0:
            tl.store(state + at - 1, old, mask=is_kept)
    tl.store(state + WIDTH - 2, new, mask=is_kept)
    if bias is not None:
        total += tl.load(bias + channels, mask=mask).to(tl.float32)
    total = total.to(out.dtype.element_ty)
    if SILU:
        wide = total.to(tl.float32)
        total = (wide / (1 + tl.exp(-wide))).to(out.dtype.element_ty)
    tl.store(out + row * num_channels + channels, total, mask=mask)


@triton.jit
def _delta_rule(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    g,
    beta,
    pool,
    slot_idx,
    input_pos,
    cu_seqlen,
    out,
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
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BY_ROW: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """Some columns of the matrix of one head of one sequence."""
    row, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    ks, vs = tl.arange(0, K_BLOCK), tl.program_id(2) * V_BLOCK + tl.arange(0, V_BLOCK)
    k_mask, v_mask = ks < K_DIM, vs < V_DIM
    mask = k_mask[:, None] & v_mask[None, :]
    slot, known = tl.load(slot_idx + row), tl.where(tl.load(input_pos + row) > 0, K_DIM, 0)
    place = pool + ((slot * heads + head) * K_DIM + ks[:, None]) * V_DIM + vs[None, :]
    state = tl.load(place, mask=mask & (ks < known)[:, None], other=0.0)
    start, end = _tokens(cu_seqlen, row)
    for token in range(start, end):
        q = tl.load(query + token * query_row + head // GROUP * query_head + ks, mask=k_mask, other=0.0)
        k = tl.load(key + token * key_row + head // GROUP * key_head + ks, mask=k_mask, other=0.0)
        v = tl.load(value + token * value_row + head * value_head + vs, mask=v_mask, other=0.0)
        learned = tl.load(beta + token * beta_row + head * beta_head).to(tl.float32)
        q, k = q.to(tl.float32), k.to(tl.float32)
        if NORMALISE:
            q = q / tl.sqrt(tl.sum(q * q) + 1e-6)
            k = k / tl.sqrt(tl.sum(k * k) + 1e-6)
        if BY_ROW:
            decay = tl.load(g + token * g_row + head * g_head + ks, mask=k_mask, other=0.0).to(tl.float32)
            state *= tl.exp(decay)[:, None]
        else:
            state *= tl.exp(tl.load(g + token * g_row + head * g_head).to(tl.float32))
        missing = learned * (v.to(tl.float32) - tl.sum(k[:, None] * state, 0))
        state += k[:, None] * missing[None, :]
        result = tl.sum((q * scale)[:, None] * state, 0)
        target = out + (token * heads + head) * V_DIM + vs
        tl.store(target, result.to(out.dtype.element_ty), mask=v_mask)
    if slot > 0:
        tl.store(place, state, mask=mask)


@triton.jit
def _ssd(  # type: ignore[no-untyped-def]
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
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Some rows of the matrix of one head of one sequence."""
    row, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    dims, states = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATE_BLOCK)
    dim_mask, state_mask = dims < DIM, states < STATE
    mask = dim_mask[:, None] & state_mask[None, :]
    slot, known = tl.load(slot_idx + row), tl.where(tl.load(input_pos + row) > 0, DIM, 0)
    place = pool + ((slot * heads + head) * DIM + dims[:, None]) * STATE + states[None, :]
    state = tl.load(place, mask=mask & (dims < known)[:, None], other=0.0)
    rate = tl.load(A + head).to(tl.float32)
    start, end = _tokens(cu_seqlen, row)
    for token in range(start, end):
        step = _time_step(tl.load(dt + token * dt_row + head * dt_head), dt_bias, head, None, SOFTPLUS)
        step = tl.minimum(tl.maximum(step, least, propagate_nan=_NAN), most, propagate_nan=_NAN)
        x = tl.load(hidden_states + token * x_row + head * x_head + dims, mask=dim_mask, other=0.0)
        b = tl.load(B + token * b_row + head // GROUP * b_group + states, mask=state_mask, other=0.0)
        c = tl.load(C + token * c_row + head // GROUP * c_group + states, mask=state_mask, other=0.0)
        x = x.to(tl.float32)
        state = state * tl.exp(step * rate) + (x * step)[:, None] * b.to(tl.float32)[None, :]
        result = tl.sum(state * c.to(tl.float32)[None, :], 1)
        if D is not None:
            result += x * tl.load(D + head).to(tl.float32)
        target = out + (token * heads + head) * DIM + dims
        tl.store(target, result.to(out.dtype.element_ty), mask=dim_mask)
    if slot > 0:
        tl.store(place, state, mask=mask)


@triton.jit
def _selective(  # type: ignore[no-untyped-def]
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
    dt_row,
    b_row,
    c_row,
    num_channels,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Some channels of one sequence."""
    row = tl.program_id(0).to(tl.int64)
    channels, states = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATE_BLOCK)
    channel_mask, state_mask = channels < num_channels, states < STATE
    mask = channel_mask[:, None] & state_mask[None, :]
    a = tl.load(A + channels[:, None] * STATE + states[None, :], mask=mask, other=0.0).to(tl.float32)
    slot, known = tl.load(slot_idx + row), tl.where(tl.load(input_pos + row) > 0, num_channels, 0)
    place = pool + (slot * num_channels + channels[:, None]) * STATE + states[None, :]
    state = tl.load(place, mask=mask & (channels < known)[:, None], other=0.0)
    start, end = _tokens(cu_seqlen, row)
    for token in range(start, end):
        step = tl.load(dt + token * dt_row + channels, mask=channel_mask, other=0.0)
        step = _time_step(step, dt_bias, channels, channel_mask, SOFTPLUS)
        x = tl.load(hidden_states + token * x_row + channels, mask=channel_mask, other=0.0).to(tl.float32)
        b = tl.load(B + token * b_row + states, mask=state_mask, other=0.0).to(tl.float32)
        c = tl.load(C + token * c_row + states, mask=state_mask, other=0.0).to(tl.float32)
        state = state * tl.exp(step[:, None] * a) + (x * step)[:, None] * b[None, :]
        result = tl.sum(state * c[None, :], 1)
        if D is not None:
            result += x * tl.load(D + channels, mask=channel_mask, other=0.0).to(tl.float32)
        target = out + token * num_channels + channels
        tl.store(target, result.to(out.dtype.element_ty), mask=channel_mask)
    if slot > 0:
        tl.store(place, state, mask=mask)


@triton.jit
def _tokens(cu_seqlen, row):  # type: ignore[no-untyped-def]
    """The first token of a sequence, and the first one behind it."""
    if cu_seqlen is None:
        start, end = row, row + 1
    else:
        start, end = tl.load(cu_seqlen + row).to(tl.int64), tl.load(cu_seqlen + row + 1).to(tl.int64)
    return start, end


@triton.jit
def _time_step(step, bias, at, mask, SOFTPLUS: tl.constexpr):  # type: ignore[no-untyped-def]
    """In float32, with the bias and softplus as torch has it: the number itself where it is above 20."""
    step = step.to(tl.float32)
    if bias is not None:
        step += tl.load(bias + at, mask=mask).to(tl.float32)
    if SOFTPLUS:
        step = tl.where(step > 20, step, tl.log(1 + tl.exp(tl.minimum(step, 20.0, propagate_nan=_NAN))))
    return step
