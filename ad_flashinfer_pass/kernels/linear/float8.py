"""Numbers of float8_e4m3fn or 4 bits and their scales, by torch's kernels: ``ops.quantized_linear``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass.kernels.linear import four_bits

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
    zero_point: Tensor | None = None,
) -> Tensor:
    """``ops.quantized_linear``; x [tokens, depth]."""
    exact = torch.promote_types(x.dtype, torch.float32)
    plain = dequantized(weight, weight_scale, exact, zero_point)
    out = F.linear(quantized(x.to(exact), input_scale, activation), plain)
    if bias is None:
        return out.to(x.dtype)
    if activation == "block":
        return out.to(x.dtype) + bias
    return (out + bias).to(x.dtype)


def quantized(x: Tensor, scale: Tensor | None, activation: str) -> Tensor:
    """What is left of activations after float8, in their own dtype and size.

    Args:
        x: [tokens, depth], float32 or float64.
        scale: one number, or one a token, for ``tensor``.
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


def dequantized(
    weight: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None
) -> Tensor:
    """weight * scale, rounded once to float32 or float64, then to a dtype; [..., rows, depth].

    Args:
        weight: [..., rows, depth], or 4 bits: uint8 [..., rows, depth / 2].
        scale: one number, [..., 1, 1], [..., rows, 1], or [..., rows / 128, depth / 128], rounded up; of 4
            bits as ``four_bits.dequantized`` takes it.
        dtype: of the result.
        zero_point: of integers of 4 bits.
    """
    if weight.dtype == torch.uint8:
        return four_bits.dequantized(weight, scale, zero_point, dtype)
    exact = torch.promote_types(dtype, torch.float32)
    scale = scale.to(exact)
    if not is_by_blocks(weight, scale):
        return (weight.to(exact) * scale).to(dtype)
    rows, depth = weight.shape[-2:]
    scale = scale.repeat_interleave(BLOCK, -1)[..., :depth]
    if rows % BLOCK:
        return (weight.to(exact) * scale.repeat_interleave(BLOCK, -2)[..., :rows, :]).to(dtype)
    blocks = weight.to(exact).unflatten(-2, (-1, BLOCK)) * scale[..., None, :]
    return blocks.flatten(-3, -2).to(dtype)


def has_kernels(weight: Tensor, scale: Tensor) -> bool:
    """Whether our kernels read a quantized weight: float8, or 4 bits as ``four_bits`` says."""
    if weight.dtype == torch.uint8:
        return four_bits.has_kernels(weight, scale)
    return weight.dtype == torch.float8_e4m3fn


def is_by_blocks(weight: Tensor, scale: Tensor) -> bool:
    """Whether each block of a weight has its own scale, not each row or all of it."""
    shape = tuple(scale.shape[-2:])
    return len(shape) == 2 and shape not in ((1, 1), (weight.shape[-2], 1))
