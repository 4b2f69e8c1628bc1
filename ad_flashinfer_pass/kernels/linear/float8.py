"""Numbers of float8_e4m3fn and their scales, by torch's kernels: what ``ops.quantized_linear`` computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Rows and columns of a weight that share a scale, and elements of an activation."""
LARGEST = torch.finfo(torch.float8_e4m3fn).max
ACTIVATIONS = ("none", "tensor", "token", "block")
"""How activations are quantized."""


def by_torch(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """``ops.quantized_linear``; x [tokens, depth]."""
    exact = torch.promote_types(x.dtype, torch.float32)
    out = F.linear(quantized(x.to(exact), input_scale, activation), dequantized(weight, weight_scale, exact))
    if bias is None:
        return out.to(x.dtype)
    if activation == "block":
        return out.to(x.dtype) + bias
    return (out + bias).to(x.dtype)


def quantized(x: Tensor, scale: Tensor | None, activation: str) -> Tensor:
    """What is left of activations after float8, in their own dtype and size.

    Args:
        x: [tokens, depth], float32 or float64.
        scale: one number, for ``tensor``.
        activation: one of ``ACTIVATIONS``.
    """
    if activation == "none":
        return x
    if activation == "block":
        depth = x.shape[-1]
        groups = F.pad(x, (0, -depth % BLOCK)).unflatten(-1, (-1, BLOCK))
        return quantized(groups, None, "token").flatten(1)[:, :depth]
    if activation == "token":
        scale = x.abs().amax(-1, keepdim=True) / LARGEST
        scale = scale.masked_fill(scale == 0, 1.0)
    else:
        assert scale is not None
        scale = scale.to(x.dtype)
    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(x.dtype) * scale


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * scale, rounded once to float32 or float64, then to a dtype.

    Args:
        weight: [rows, depth].
        scale: one number, [rows, 1], or [rows / 128, depth / 128], rounded up.
        dtype: of the result.
    """
    exact = torch.promote_types(dtype, torch.float32)
    scale = scale.to(exact)
    if is_by_blocks(weight, scale):
        rows, depth = weight.shape
        scale = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :depth]
    return (weight.to(exact) * scale).to(dtype)


def is_by_blocks(weight: Tensor, scale: Tensor) -> bool:
    """Whether each block of a weight has its own scale, not each row or all of it."""
    return scale.numel() > 1 and tuple(scale.shape) != (weight.shape[0], 1)
