"""Mamba 2: a matrix of each head, and one decay. S <- exp(dt A) S + dt x B^T;  out = S C."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.state.slots import Recurrence

_SIZE = 64
"""Tokens of a chunk."""


def recurrence(
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    limits: tuple[float, float | None],
) -> Recurrence:
    """Of hidden_states, dt, B and C; see ``ops.ssd_scan``."""

    def inputs(hidden_states: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
        return _inputs(hidden_states, time_steps(dt, dt_bias, softplus, *limits), A, B, C)

    def finish(scanned: Tensor, hidden_states: Tensor, *_: Tensor) -> Tensor:
        if D is not None:
            scanned = scanned + hidden_states * D.to(scanned.dtype)[:, None]
        return scanned.to(hidden_states.dtype)

    step, prefill = None, None
    if A.is_cuda:
        from ad_flashinfer_pass.kernels.state import prefill as of_many  # need triton
        from ad_flashinfer_pass.kernels.state import step as of_one

        step, prefill = (partial(of.ssd, (A, D, dt_bias), softplus, limits) for of in (of_one, of_many))

    return Recurrence(inputs, chunk, finish, _SIZE, step, prefill)


def _inputs(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    """In float32 at least, with B and C for each head."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    dt = dt.to(dtype)
    group = hidden_states.shape[2] // B.shape[2]
    B, C = (x.to(dtype).repeat_interleave(group, 2) for x in (B, C))
    return hidden_states.to(dtype) * dt[..., None], dt * A.to(dtype), B, C


def time_steps(
    dt: Tensor, bias: Tensor | None, softplus: bool, least: float | None = None, most: float | None = None
) -> Tensor:
    """The time step of each token, from what the model projects; bias: for the last dimension."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    if softplus:
        dt = torch.nn.functional.softplus(dt)
    return dt if least is None else dt.clamp(least, most)


def chunk(state: Tensor, x: Tensor, decay: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """See ``Recurrence``; state: [n, num_heads, head_dim, state_size]."""
    x, B, C = (each.transpose(1, 2) for each in (x, B, C))
    total = decay.transpose(1, 2).cumsum(2)
    num = x.shape[2]
    later = torch.ones(num, num, dtype=torch.bool, device=x.device).triu(1)
    pairs = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()
    grown = total.exp()[..., None]
    result = ((C @ B.mT) * pairs) @ x + (C * grown) @ state.mT
    left = (total[..., -1:] - total).exp()[..., None]
    return result.transpose(1, 2), state * grown[..., -1:, :] + (x * left).mT @ B
