"""Mamba 1: each channel has numbers that forget, each by its own. s <- exp(dt A) s + dt x B;  out = s C."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass.kernels.state.slots import Recurrence
from ad_flashinfer_pass.kernels.state.ssd_scan import time_steps

_SIZE = 64
"""Tokens of a chunk."""


def recurrence(A: Tensor, D: Tensor | None, dt_bias: Tensor | None, softplus: bool) -> Recurrence:
    """Of hidden_states, dt, B and C; see ``ops.selective_scan``."""

    def inputs(hidden_states: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        dt = time_steps(dt, dt_bias, softplus)
        return tuple(x.to(dtype) for x in (hidden_states, dt, B, C))

    def finish(scanned: Tensor, hidden_states: Tensor, *_: Tensor) -> Tensor:
        if D is not None:
            scanned = scanned + hidden_states * D.to(scanned.dtype)
        return scanned.to(hidden_states.dtype)

    step: Callable[..., None] | None = None
    if A.is_cuda:
        from ad_flashinfer_pass.kernels.state import step as by_triton  # needs triton

        step = partial(by_triton.selective, (A, D, dt_bias), softplus)

    return Recurrence(inputs, partial(chunk, A), finish, _SIZE, step)


def chunk(A: Tensor, state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """See ``Recurrence``; state: [n, channels, state_size]."""
    factor = (dt[..., None] * A.to(dt.dtype)).exp()
    states = (dt * x)[..., None] * B[..., None, :]
    reach = 1
    while reach < x.shape[1]:  # in each round a token takes in twice as many before it
        before = (0, 0, 0, 0, reach, 0)
        states = states + factor * F.pad(states[:, :-reach], before)
        factor = factor * F.pad(factor[:, :-reach], before, value=1.0)
        reach *= 2
    states = states + factor * state[:, None]
    return (states @ C[..., None])[..., 0], states[:, -1]
