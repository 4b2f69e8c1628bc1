"""The gated delta rule: a matrix of each head that forgets, and learns a value for a key.

S <- exp(decay) S;  S <- S + k (beta (v - k S));  out = q S, with a decay of each head, or of each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIZE = 64
"""Tokens of a chunk with one decay for each head."""
SIZE_BY_ROW = 16
"""With one for each row: there is a number for each pair of tokens and row."""


def inputs(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, normalise: bool
) -> tuple[Tensor, ...]:
    """What ``chunk`` takes of each token, in float32 at least.

    Args:
        query: [b, s, num_k_heads, k_dim]; key alike.
        value: [b, s, num_heads, v_dim].
        g: [b, s, num_heads] or [b, s, num_heads, k_dim].
        beta: [b, s, num_heads].
        normalise: divide queries and keys by their norms.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value, g, beta = (x.to(dtype) for x in (query, key, value, g, beta))
    if normalise:
        query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    group = value.shape[2] // key.shape[2]
    if group > 1:
        query, key = (x.repeat_interleave(group, 2) for x in (query, key))
    decay = g if g.dim() == 4 else g[..., None]
    return query * query.shape[-1] ** -0.5, key, value, decay, beta[..., None]


def chunk(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``slots.Chunk``; state: [n, num_heads, k_dim, v_dim]."""
    query, key, value, decay, beta = (x.transpose(1, 2) for x in (query, key, value, decay, beta))
    total = decay.cumsum(2)
    grown = total.exp()
    missing = beta * (value - (key * grown) @ state)
    num = query.shape[2]
    pairs = total[..., :, None, :] - total[..., None, :, :]
    later = torch.ones(num, num, dtype=torch.bool, device=query.device).triu(1)
    pairs = pairs.masked_fill(later[..., None], float("-inf")).exp()
    if num > 1:  # each token learns what the ones before it have not
        system = _scores(key * beta, key, pairs)
        missing = torch.linalg.solve_triangular(system, missing, upper=False, unitriangular=True)
    result = (query * grown) @ state + _scores(query, key, pairs) @ missing
    left = (total[..., -1:, :] - total).exp()
    state = state * grown[..., -1, :, None] + (key * left).mT @ missing
    return result.transpose(1, 2), state


def _scores(left: Tensor, right: Tensor, pairs: Tensor) -> Tensor:
    """Products of the rows of two matrices, decayed."""
    if pairs.shape[-1] == 1:
        return (left @ right.mT) * pairs[..., 0]
    return (left[..., :, None, :] * right[..., None, :, :] * pairs).sum(-1)
