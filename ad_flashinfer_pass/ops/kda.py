"""``ad_flashinfer.kda``, Kimi's delta attention, and the same with a cache."""

from __future__ import annotations

from torch import Tensor

from ad_flashinfer_pass.ops.define import define
from ad_flashinfer_pass.ops.gated_delta_rule import cached_gated_delta_rule, gated_delta_rule


def kda(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, use_qk_l2norm: bool = False
) -> Tensor:
    """``gated_delta_rule`` with a decay for each row of the matrix: g is [b, s, num_heads, k_dim]."""
    return gated_delta_rule(query, key, value, g, beta, use_qk_l2norm)


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
    batch = (batch_info_host, cu_seqlen, input_pos, slot_idx)
    return cached_gated_delta_rule(query, key, value, g, beta, use_qk_l2norm, recurrent_state, *batch)


define(kda, fake=lambda query, value, **_: query.new_empty(value.shape))
define(cached_kda, fake=lambda query, value, **_: query.new_empty(value.shape), mutates=("recurrent_state",))
