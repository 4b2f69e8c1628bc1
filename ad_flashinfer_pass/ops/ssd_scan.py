"""``ad_flashinfer.ssd_scan``, the recurrence of Mamba 2, and the same with a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.state import ssd_scan as kernel
from ad_flashinfer_pass.kernels.state.slots import Batch, cached_scan, scan
from ad_flashinfer_pass.ops.define import define


def ssd_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> Tensor:
    """Each head has a matrix S [head_dim, state_size], zero at first, that decays by one number a token.

    A token x does ``S = exp(dt * A) * S + outer(dt * x, B)`` and gets ``S @ C + D * x``, in float32.

    Args:
        hidden_states: x, [b, s, num_heads, head_dim].
        dt: [b, s, num_heads], the time step.
        A: [num_heads], negative.
        B: [b, s, num_groups, state_size]; num_heads is a multiple of num_groups.
        C: as B.
        D: [num_heads].
        dt_bias: [num_heads], added to dt.
        dt_softplus: take softplus of that.
        dt_min: the least time step.
        dt_max: the largest time step.

    Returns:
        [b, s, num_heads, head_dim] in the dtype of hidden_states.
    """
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    state = hidden_states.new_zeros(
        (*hidden_states.shape[:3:2], hidden_states.shape[3], B.shape[3]), dtype=dtype
    )
    return scan(
        kernel.recurrence(A, D, dt_bias, dt_softplus, (dt_min, dt_max)), state, hidden_states, dt, B, C
    )


def cached_ssd_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float | None,
    recurrent_state: Tensor,
    batch_info_host: Tensor,
    cu_seqlen: Tensor,
    input_pos: Tensor,
    slot_idx: Tensor,
) -> Tensor:
    """``ssd_scan`` of the new tokens of sequences, from the states in their slots on.

    Args:
        hidden_states: [b, s, num_heads, head_dim] with b * s tokens of a ragged batch, padding last; so are
            dt, B and C. For these and what follows see ``ssd_scan``.
        recurrent_state: [num_slots, num_heads, head_dim, state_size]; read and written.
        batch_info_host: for this and what follows see ``cached_causal_conv1d``.

    Returns:
        As ``ssd_scan``; zeros for padding tokens.
    """
    out = hidden_states.new_empty(hidden_states.shape)
    batch = Batch(batch_info_host, cu_seqlen, input_pos, slot_idx)
    recurrence = kernel.recurrence(A, D, dt_bias, dt_softplus, (dt_min, dt_max))
    return cached_scan(recurrence, recurrent_state, batch, out, hidden_states, dt, B, C)


define(ssd_scan, fake=lambda hidden_states, **_: hidden_states.new_empty(hidden_states.shape))
define(
    cached_ssd_scan,
    fake=lambda hidden_states, **_: hidden_states.new_empty(hidden_states.shape),
    mutates=("recurrent_state",),
)
