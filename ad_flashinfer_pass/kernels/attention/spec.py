"""What an attention site computes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionSpec(NamedTuple):
    """What an attention site computes; see ``ops.cached_attention`` for the meaning of each."""

    scale: float
    sliding_window: int | None = None
    logit_cap: float | None = None
    chunk: int | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    v_head_dim: int | None = None
    """None: that of the query."""
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    key_up: Tensor | None = None
    value_up: Tensor | None = None
