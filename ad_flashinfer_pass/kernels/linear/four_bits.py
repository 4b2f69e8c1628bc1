"""Weights of 4 bits, two in a byte, and their scales by groups, by torch's kernels.

They lie as our kernels read them: a block of 64 elements of a row is 16 little-endian words of 16 bits, and
word j has from its lowest bits on the elements j, j + 16, j + 32 and j + 48. Rows of another length than
blocks have them in order. With scales that are real numbers they are integers, with scales that are bytes
MXFP4 (OCP Microscaling Formats, 5.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
"""Elements of a row that are laid out together."""
ZERO_POINT = 8
"""Of integers that have no other."""
NOT_A_NUMBER = 255
"""As a scale of MXFP4."""


def pack(values: Tensor) -> Tensor:
    """As kernels read them: integers 0 to 15 [..., even], as uint8 [..., half of it]."""
    values = values.to(torch.uint8)
    if values.shape[-1] % BLOCK == 0:
        values = values.unflatten(-1, (-1, 4, 16)).mT.flatten(-3)
    return values[..., ::2] | values[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """What was packed: uint8 0 to 15 [..., 2 * bytes] of uint8 [..., bytes]."""
    values = halves(packed)
    return values.unflatten(-1, (-1, 16, 4)).mT.flatten(-3) if values.shape[-1] % BLOCK == 0 else values


def halves(packed: Tensor) -> Tensor:
    """The two numbers of each byte, the low half first: uint8 0 to 15 [..., 2 * bytes]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def dequantized(packed: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the packed numbers stand for, [..., depth], rounded once from at least float32 to a dtype.

    Args:
        packed: uint8 [..., depth / 2], by ``pack``.
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


def has_kernels(packed: Tensor, scale: Tensor) -> bool:
    """Whether ``four_bit_sums`` reads a weight: of whole blocks, groups of 32 or a multiple of 64."""
    depth = 2 * packed.shape[-1]
    group = depth // scale.shape[-1]
    return depth % BLOCK == 0 and (group == BLOCK // 2 or group % BLOCK == 0)


def e2m1(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of float4_e2m1, of a sign, two bits of exponent and one of mantissa: 0 to 6.

    Args:
        codes: 0 to 15.
        dtype: of the result.
    """
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    halves = (mantissa + 2 * (exponent > 0)) << (exponent.int() - 1).clamp(min=0).to(codes.dtype)
    return torch.where(codes >= 8, -0.5, 0.5).to(dtype) * halves.to(dtype)
