"""A linear and what stands around it, by torch's kernels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def by_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """``ops.linear`` by torch's kernels; x [tokens, depth]."""
    if norm is not None:
        x = F.rms_norm(x, norm.shape, norm, eps)
    out = F.linear(x, weight, bias)
    if gated:
        gate, up = out.chunk(2, -1)
        out = F.silu(gate) * up
    return out if residual is None else residual + out
