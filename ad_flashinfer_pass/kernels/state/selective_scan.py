"""Mamba 1: each channel has numbers that forget, each by its own. s <- exp(dt A) s + dt x B;  out = s C."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 64
"""Tokens of a chunk."""


def inputs(hidden_states: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    """What ``chunk`` takes of each token beside A, in float32 at least; dt: as it multiplies."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    return tuple(x.to(dtype) for x in (hidden_states, dt, B, C))


def chunk(state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """See ``slots.Chunk``; state: [n, channels, state_size]."""
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
