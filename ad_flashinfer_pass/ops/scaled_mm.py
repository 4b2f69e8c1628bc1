"""``ad_flashinfer.scaled_mm``: a product of float8 factors and their scales."""

from __future__ import annotations

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.linear import quantized
from ad_flashinfer_pass.ops.define import define
from ad_flashinfer_pass.ops.launch import launching


def scaled_mm(
    values: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(values * scale) (weight * weight_scale)^T + bias, summed in float32.

    Args:
        values: float8_e4m3fn [tokens, depth].
        weight: float8_e4m3fn [rows, depth].
        scale: float32, of each token, [tokens, 1], or of all, [1].
        weight_scale: float32, of each row, [rows, 1], or of all, [1].
        bias: [rows], of dtype.
        dtype: of the result; bfloat16 where tokens or rows have scales of their own, on a GPU.

    Returns:
        [tokens, rows].
    """
    if values.device.type != "cuda":
        out = (values.float() * scale) @ (weight.float() * weight_scale.view(-1, 1)).T
        return (out if bias is None else out + bias).to(dtype)
    with launching(values.device):
        return quantized.scaled_mm(values, weight, scale, weight_scale, bias, dtype)


define(
    scaled_mm,
    fake=lambda values, weight, dtype, **_: values.new_empty((values.shape[0], weight.shape[0]), dtype=dtype),
)
