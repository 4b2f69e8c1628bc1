"""The gated delta rule: a matrix of each head that forgets, and learns a value for a key.

S <- exp(decay) S;  S <- S + k (beta (v - k S));  out = q S, with a decay of each head, or of each row.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.state.slots import Recurrence

_SIZE = 64
"""Tokens of a chunk with one decay for each head."""
_SIZE_BY_ROW = 16
"""With one for each row: there is a number for each pair of tokens and row."""


def recurrence(normalise: bool, g: Tensor) -> Recurrence:
    """Of query, key, value, g and beta; see ``ops.gated_delta_rule`` and ``ops.kda``."""
    by_row, step, prefill = g.dim() == 4, None, None
    if g.is_cuda:
        from ad_flashinfer_pass.kernels.state import prefill as of_many  # need triton
        from ad_flashinfer_pass.kernels.state import step as of_one

        step = partial(of_one.delta_rule, normalise)
        prefill = None if by_row else partial(of_many.delta_rule, normalise)
    return Recurrence(
        partial(_inputs, normalise),
        chunk,
        lambda result, query, *_: result.to(query.dtype),
        _SIZE_BY_ROW if by_row else _SIZE,
        step,
        prefill,
    )


def _inputs(
    normalise: bool, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, ...]:
    """In float32 at least, with a query, key and decay for each head."""
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
    """See ``Recurrence``; state: [n, num_heads, k_dim, v_dim]."""
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
