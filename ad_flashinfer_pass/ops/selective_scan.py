"""``ad_flashinfer.selective_scan``, the recurrence of Mamba 1, and the same with a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.state import selective_scan as kernel
from ad_flashinfer_pass.kernels.state.slots import Batch, cached_scan, scan
from ad_flashinfer_pass.ops.define import define


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Each channel has numbers S [state_size], zero at first, that decay each by its own.

    A token x does ``S = exp(dt * A) * S + dt * x * B`` and gets ``S @ C + D * x``, in float32.

    Args:
        hidden_states: x, [b, s, channels].
        dt: [b, s, channels], the time step.
        A: [channels, state_size], negative.
        B: [b, s, state_size].
        C: as B.
        D: [channels].
        dt_bias: [channels], added to dt.
        dt_softplus: take softplus of that.

    Returns:
        [b, s, channels] in the dtype of hidden_states.
    """
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    state = hidden_states.new_zeros((*hidden_states.shape[:3:2], A.shape[1]), dtype=dtype)
    return scan(kernel.recurrence(A, D, dt_bias, dt_softplus), state, hidden_states, dt, B, C)


def cached_selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    recurrent_state: Tensor,
    batch_info_host: Tensor,
    cu_seqlen: Tensor,
    input_pos: Tensor,
    slot_idx: Tensor,
) -> Tensor:
    """``selective_scan`` of the new tokens of sequences, from the states in their slots on.

    Args:
        hidden_states: [b, s, channels] with b * s tokens of a ragged batch, padding last; so are dt, B and C.
            For these and what follows see ``selective_scan``.
        recurrent_state: [num_slots, channels, state_size]; read and written.
        batch_info_host: for this and what follows see ``cached_causal_conv1d``.

    Returns:
        As ``selective_scan``; zeros for padding tokens.
    """
    out = hidden_states.new_empty(hidden_states.shape)
    batch = Batch(batch_info_host, cu_seqlen, input_pos, slot_idx)
    recurrence = kernel.recurrence(A, D, dt_bias, dt_softplus)
    return cached_scan(recurrence, recurrent_state, batch, out, hidden_states, dt, B, C)


define(selective_scan, fake=lambda hidden_states, **_: hidden_states.new_empty(hidden_states.shape))
define(
    cached_selective_scan,
    fake=lambda hidden_states, **_: hidden_states.new_empty(hidden_states.shape),
    mutates=("recurrent_state",),
)
