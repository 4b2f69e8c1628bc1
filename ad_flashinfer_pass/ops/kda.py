"""``ad_flashinfer.kda``, Kimi's delta attention, and the same with a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.state import delta_rule as kernel
from ad_flashinfer_pass.kernels.state.slots import Batch, cached_scan, scan
from ad_flashinfer_pass.ops.define import define


def kda(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, use_qk_l2norm: bool = False
) -> Tensor:
    """``gated_delta_rule`` with a decay for each row of the matrix: g is [b, s, num_heads, k_dim]."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    state = value.new_zeros((*value.shape[::2], key.shape[3], value.shape[3]), dtype=dtype)
    return scan(kernel.recurrence(use_qk_l2norm, g), state, query, key, value, g, beta)


def cached_kda(
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
    """``kda`` of the new tokens of sequences, from the states in their slots on.

    Args:
        query: for this and the others see ``cached_gated_delta_rule``.
    """
    batch = Batch(batch_info_host, cu_seqlen, input_pos, slot_idx)
    recurrence = kernel.recurrence(use_qk_l2norm, g)
    return cached_scan(recurrence, recurrent_state, batch, query, key, value, g, beta)


define(kda, fake=lambda query, value, **_: query.new_empty(value.shape))
define(cached_kda, fake=lambda query, value, **_: query.new_empty(value.shape), mutates=("recurrent_state",))
