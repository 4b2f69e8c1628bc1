"""``ad_flashinfer.keep_hidden_state``: what a layer gives, kept for a head that guesses tokens."""

from __future__ import annotations

from torch import Tensor

from ad_flashinfer_pass.ops.define import define


def keep_hidden_state(hidden: Tensor, hidden_states: Tensor, first: int = 0) -> None:
    """Write a vector of each token of the step, in their order.

    Args:
        hidden: [b, s, d], any strides.
        hidden_states: [tokens, width], of the same dtype, with at least b * s rows. Written in place, in the
            first b * s rows and d columns from ``first`` on, and nowhere else.
        first: column of the first element.
    """
    tokens = hidden.flatten(0, 1)
    hidden_states[: tokens.shape[0], first : first + tokens.shape[1]].copy_(tokens)


define(keep_hidden_state, fake=lambda **_: None, mutates=("hidden_states",))
