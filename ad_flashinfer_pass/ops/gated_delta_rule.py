"""``ad_flashinfer.gated_delta_rule``, of Qwen3-Next and others, and the same with a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.state import delta_rule as kernel
from ad_flashinfer_pass.kernels.state.slots import Batch, cached_scan, scan
from ad_flashinfer_pass.ops.define import define


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, use_qk_l2norm: bool = False
) -> Tensor:
    """Each head has a matrix S [k_dim, v_dim], zero at first, that learns the value of a key.

    A token does ``S = exp(g) * S``, ``S = S + outer(k, beta * (v - k @ S))``, and gets
    ``q @ S / sqrt(k_dim)``, in float32.

    Args:
        query: [b, s, num_k_heads, k_dim].
        key: [b, s, num_k_heads, k_dim].
        value: [b, s, num_heads, v_dim]; num_heads is a multiple of num_k_heads.
        g: [b, s, num_heads], logarithm of what is kept, at most 0.
        beta: [b, s, num_heads], how much is learned, 0 to 1.
        use_qk_l2norm: divide queries and keys by their norms first.

    Returns:
        [b, s, num_heads, v_dim] in the dtype of query.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    state = value.new_zeros((*value.shape[::2], key.shape[3], value.shape[3]), dtype=dtype)
    return scan(kernel.recurrence(use_qk_l2norm, g), state, query, key, value, g, beta)


def cached_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm: bool,
    recurrent_state: Tensor,
    batch_info_host: Tensor,
    cu_seqlen: Tensor,
    input_pos: Tensor,
    slot_idx: Tensor,
) -> Tensor:
    """``gated_delta_rule`` of the new tokens of sequences, from the states in their slots on.

    Args:
        query: [b, s, num_k_heads, k_dim] with b * s tokens of a ragged batch, padding last; so are key,
            value, g and beta. For these and use_qk_l2norm see ``gated_delta_rule``.
        recurrent_state: [num_slots, num_heads, k_dim, v_dim]; read and written.
        batch_info_host: for this and what follows see ``cached_causal_conv1d``.

    Returns:
        As ``gated_delta_rule``; zeros for padding tokens.
    """
    out = query.new_empty(value.shape)
    batch = Batch(batch_info_host, cu_seqlen, input_pos, slot_idx)
    recurrence = kernel.recurrence(use_qk_l2norm, g)
    return cached_scan(recurrence, recurrent_state, batch, out, query, key, value, g, beta)


define(gated_delta_rule, fake=lambda query, value, **_: query.new_empty(value.shape))
define(
    cached_gated_delta_rule,
    fake=lambda query, value, **_: query.new_empty(value.shape),
    mutates=("recurrent_state",),
)
