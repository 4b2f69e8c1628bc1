"""Weights of 4 bits, two in a byte, and their scales by groups, by torch's kernels.

Element 2i is in the low half of byte i, element 2i + 1 in the high one. With scales that are real numbers
they are integers, with scales that are bytes MXFP4 (OCP Microscaling Formats, 5.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

ZERO_POINT = 8
"""Of integers that have no other."""
NOT_A_NUMBER = 255
"""As a scale of MXFP4."""


def pack(values: Tensor) -> Tensor:
    """Two in a byte: integers 0 to 15 [..., even], as uint8 [..., half of it]."""
    values = values.to(torch.uint8)
    return values[..., ::2] | values[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """uint8 0 to 15 [..., 2 * bytes] of uint8 [..., bytes]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def dequantized(packed: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the packed numbers stand for, [..., depth], rounded once from at least float32 to a dtype.

    Args:
        packed: uint8 [..., depth / 2].
        scale: [..., depth / group]; real: of integers; uint8: powers of two of MXFP4, 2^(scale - 127).
        zero_point: uint8 [..., depth / group], of integers. Default: ``ZERO_POINT``.
        dtype: of the result.
    """
    exact = torch.promote_types(dtype, torch.float32)
    groups = unpack(packed).unflatten(-1, (scale.shape[-1], -1))
    if scale.dtype == torch.uint8:
        out = torch.ldexp(e2m1(groups, exact), (scale.int() - 127)[..., None])
    else:
        zero = ZERO_POINT if zero_point is None else zero_point.to(exact)[..., None]
        out = (groups.to(exact) - zero) * scale.to(exact)[..., None]
    return out.flatten(-2).to(dtype)


def e2m1(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of float4_e2m1, of a sign, two bits of exponent and one of mantissa: 0 to 6.

    Args:
        codes: 0 to 15.
        dtype: of the result.
    """
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    halves = (mantissa + 2 * (exponent > 0)) << (exponent.int() - 1).clamp(min=0).to(codes.dtype)
    return torch.where(codes >= 8, -0.5, 0.5).to(dtype) * halves.to(dtype)
