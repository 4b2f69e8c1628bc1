"""``ad_flashinfer.sequence_length``: the length that rotary frequencies go by, where they change with it."""

from __future__ import annotations

from torch import Tensor

from ad_flashinfer_pass.ops.define import define


def sequence_length(position_ids: Tensor) -> Tensor:
    """The length of each token's own sequence when the token is computed.

    With a cache that is the length of the prompt for a token of the prompt, and its own position + 1 for a
    generated one: the graph input ``sequence_lengths`` takes this op's place there, see ``metadata``.

    Args:
        position_ids: int64 [b, s].

    Returns:
        int64 [b, s].
    """
    return (position_ids.amax(-1, keepdim=True) + 1).expand_as(position_ids).contiguous()


define(sequence_length, fake=lambda position_ids: position_ids.new_empty(position_ids.shape))
