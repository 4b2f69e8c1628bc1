"""What stands between the two projections of an expert, in Triton; ``by_torch.gated`` in plain torch."""

from __future__ import annotations

import triton
import triton.language as tl

NAN = tl.constexpr(tl.PropagateNan.ALL)
"""A token that is not a number stays so, as by torch, and is not cut to the limit."""


@triton.jit
def activate(  # type: ignore[no-untyped-def]
    gate,
    up,
    alpha,
    beta,
    limit,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
):
    """activation(min(gate, limit)) * (clamp(up, -limit, limit) + beta) in float32; without a gate of gate.

    SCALED: the activated gate is gate * sigmoid(alpha * gate).
    """
    if GATED:
        gate = tl.minimum(gate, limit, propagate_nan=NAN)
        up = tl.maximum(tl.minimum(up, limit, propagate_nan=NAN), -limit, propagate_nan=NAN) + beta
    if SCALED:
        value = gate * tl.sigmoid(alpha * gate)
    elif ACTIVATION == "silu":
        value = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        value = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        value = gate * tl.sigmoid(2 * inner)
    else:
        value = tl.maximum(gate, 0.0, propagate_nan=NAN)
        if ACTIVATION == "relu2":
            value *= value
    return value * up if GATED else value
