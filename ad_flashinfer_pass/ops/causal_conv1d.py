"""``ad_flashinfer.causal_conv1d``: each channel over a token and those before it; the same with a cache."""

from __future__ import annotations

from torch import Tensor

from ad_flashinfer_pass.kernels.state import causal_conv1d as kernel
from ad_flashinfer_pass.kernels.state.slots import Batch
from ad_flashinfer_pass.ops.define import define


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """The sum over j of ``weight[c, j] * x[b, t - k + 1 + j, c]``, with zeros before the first token.

    Args:
        x: [b, s, channels].
        weight: [channels, k].
        bias: [channels].
        activation: of the sum: "silu" or none.

    Returns:
        [b, s, channels] in the dtype of x; sums are in float32.
    """
    return kernel.convolve(x, weight, bias, activation)


def cached_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    conv_state: Tensor,
    batch_info_host: Tensor,
    cu_seqlen: Tensor,
    input_pos: Tensor,
    slot_idx: Tensor,
) -> Tensor:
    """``causal_conv1d`` of the new tokens of sequences, whose last tokens stand in slots.

    Args:
        x: [b, s, channels], with b * s tokens of a ragged batch, padding last.
        weight: as of ``causal_conv1d``; so are bias and activation.
        conv_state: [num_slots, channels, k - 1], the last tokens of each sequence; read and written.
        batch_info_host: int32, host, see ``sequence_info.BatchInfo``.
        cu_seqlen: int32 [max_rows + 1], exclusive prefix sum of new tokens.
        input_pos: int32 [max_rows], tokens that came before; where it is 0 the slot counts as zeros.
        slot_idx: int64 [max_rows]. Slot 0 is scratch.

    Returns:
        As ``causal_conv1d``; zeros for padding tokens.
    """
    batch = Batch(batch_info_host, cu_seqlen, input_pos, slot_idx)
    return kernel.cached_convolve(x, weight, bias, activation, conv_state, batch)


define(causal_conv1d, fake=lambda x, **_: x.new_empty(x.shape))
define(cached_causal_conv1d, fake=lambda x, **_: x.new_empty(x.shape), mutates=("conv_state",))
