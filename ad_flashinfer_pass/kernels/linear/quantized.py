"""Which kernels run a linear whose weight is float8 or of 4 bits, by device, dtypes and activations.

- ``float8.by_torch``: what ``ops.quantized_linear`` says, in float32; on a CPU, and in float32.
- ``torch._scaled_mm``: both factors in float8 (W8A8), where one scale is that of a token, or of all, and the
  other that of a row of the weight, or of all.
- A copy of the weight in 16 bits for this call, and torch's linear (W8A16): everywhere else.

For few tokens ``small_gemm`` is faster; who knows the number of tokens asks for it.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass.kernels import workspaces
from ad_flashinfer_pass.kernels.linear import float8

_FLOATS = (torch.bfloat16, torch.float16)
_MULTIPLE = 16
"""Of rows and depth, for torch._scaled_mm."""
_MANY = 512
"""Tokens from which its kernels with scales by token and row are the faster; before, those with one scale and
a kernel that multiplies by the scales: Llama-3.1-8B's shapes on an H200, 256 and 8,192 tokens."""


class Quantization(NamedTuple):
    """How a weight and its activations are quantized; see ``ops.quantized_linear``."""

    weight_scale: Tensor
    input_scale: Tensor | None = None
    activation: str = "none"
    zero_point: Tensor | None = None

    @property
    def has_many_scales(self) -> bool:
        """Whether tokens or rows have scales of their own."""
        return self.activation == "token" or self.weight_scale.numel() > 1

    def scaling(self, weight: Tensor) -> str:
        """What of a weight shares a scale: tensor, row, block or group of so many elements."""
        if weight.dtype == torch.uint8:
            return f"group of {2 * weight.shape[-1] // self.weight_scale.shape[-1]}"
        if float8.is_by_blocks(weight, self.weight_scale):
            return "block"
        return "row" if self.weight_scale.numel() > 1 else "tensor"


def run(x: Tensor, weight: Tensor, how: Quantization, bias: Tensor | None) -> Tensor:
    """``ops.quantized_linear``; x [tokens, depth]."""
    if x.device.type != "cuda" or x.dtype not in _FLOATS:
        args = (how.weight_scale, how.input_scale, bias, how.activation, how.zero_point)
        return float8.by_torch(x, weight, *args)
    if fits_scaled_mm(x.dtype, weight, how):
        return _scaled_mm(x.contiguous(), weight, how, bias)
    from ad_flashinfer_pass.kernels.linear.quantize import expand  # needs triton

    return F.linear(x, expand(weight.contiguous(), how.weight_scale, x.dtype, how.zero_point), bias)


def fits_scaled_mm(dtype: torch.dtype, weight: Tensor, how: Quantization) -> bool:
    """Whether torch._scaled_mm computes it, for x of a 16-bit dtype."""
    return (
        weight.dtype == torch.float8_e4m3fn
        and how.activation in ("tensor", "token")
        and how.scaling(weight) != "block"
        and not any(size % _MULTIPLE for size in weight.shape)
        and (dtype == torch.bfloat16 or not how.has_many_scales)
        and torch.cuda.get_device_capability(weight.device) >= (8, 9)
    )


def _scaled_mm(x: Tensor, weight: Tensor, how: Quantization, bias: Tensor | None) -> Tensor:
    from ad_flashinfer_pass.kernels.linear.quantize import quantize  # needs triton

    input_scale = None if how.input_scale is None else how.input_scale.float()
    values, scale = quantize(x, input_scale)
    if input_scale is not None:
        scale = input_scale.view(1)
    return scaled_mm(values, weight, scale, how.weight_scale.float().view(-1, 1), bias, x.dtype)


def scaled_mm(
    values: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``ops.scaled_mm`` on a GPU, of what ``fits_scaled_mm``."""
    multiply = partial(torch._scaled_mm, values, weight.t(), out_dtype=dtype, use_fast_accum=True)
    num_tokens, rows = len(values), len(weight)
    if scale.numel() == weight_scale.numel() == 1:
        return multiply(scale.view(1), weight_scale.view(1), bias)
    if num_tokens >= _MANY:
        of_rows = weight_scale.view(1, -1).expand(1, rows).contiguous()
        return multiply(scale.view(-1, 1).expand(num_tokens, 1).contiguous(), of_rows, bias)
    from ad_flashinfer_pass.kernels.linear.quantize import rescale  # needs triton

    one = workspaces.get(_one, values.device)
    return rescale(multiply(one, one), scale, weight_scale, bias)


def _one(device: torch.device) -> Tensor:
    return torch.ones(1, device=device)
