"""A linear and what stands around it, by torch's kernels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass.kernels.linear import quantized
from ad_flashinfer_pass.kernels.linear.quantized import Quantization


def by_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
    quantization: Quantization | None = None,
) -> Tensor:
    """``ops.linear`` by torch's kernels, or those of ``quantized``; x [tokens, depth]."""
    if norm is not None:
        x = F.rms_norm(x, norm.shape, norm, eps)
    out = F.linear(x, weight, bias) if quantization is None else quantized.run(x, weight, quantization, bias)
    if gated:
        gate, up = out.chunk(2, -1)
        out = F.silu(gate) * up
    return out if residual is None else residual + out
