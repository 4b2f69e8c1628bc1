"""``ad_flashinfer.quantized_linear``: a linear of a float8 or 4-bit weight, with its checkpoint's scales."""

from __future__ import annotations

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.linear import float8, quantized
from ad_flashinfer_pass.ops.define import define


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    zero_point: Tensor | None = None,
) -> Tensor:
    """q(x) (weight * weight_scale)^T + bias, where q rounds activations as the checkpoint asks.

    Token by token: a row of the result depends on the same row of x. All is computed in float32, in float64
    if x is: x, the scales and the weight are taken to it, products are summed in it, and the sum is rounded
    once to the dtype of x.
    On a GPU in bfloat16 and float16 the same by other kernels, see ``kernels.linear.quantized``.

    A q other than ``none`` gives round(clamp(x / s, -448, 448)) * s, rounded to float8_e4m3fn, to nearest,
    ties to even; what is 0 everywhere stays 0.

    Args:
        x: [..., depth], float32, float64, bfloat16 or float16.
        weight: [rows, depth], float8_e4m3fn; or integers of 4 bits, uint8 [rows, depth / 2], as
            ``four_bits.pack`` lays them out, each for itself minus its zero point.
        weight_scale: of all of the weight, [] or [1]; of each row, [rows, 1]; or of each block of 128 x 128,
            [ceil(rows / 128), ceil(depth / 128)]. Any real dtype. Of 4 bits, of each group of elements of a
            row, [rows, depth / group].
        input_scale: [] or [1], the s of ``tensor``.
        bias: [rows]; added before the rounding, but with ``block`` to the rounded sum, as transformers does.
        activation: none: q(x) is x; tensor: s is input_scale; token: s is the largest magnitude of the row
            / 448; block: s is that of each 128 elements of the row, from the first on, / 448.
        zero_point: uint8 [rows, depth / group], of 4 bits alone. Default: 8.

    Returns:
        [..., rows], contiguous, in the dtype of x.

    Raises:
        ValueError: an activation is unknown, or ``tensor`` has no input_scale, or another has one.
    """
    if activation not in float8.ACTIVATIONS or (activation == "tensor") != (input_scale is not None):
        raise ValueError(
            f"quantized_linear: activation must be one of {', '.join(float8.ACTIVATIONS)}, and input_scale "
            f"goes with tensor alone, got {activation!r} with{'out' if input_scale is None else ''} one."
        )
    if x.dtype.itemsize < 2:
        raise ValueError(
            f"quantized_linear: x must be of 16, 32 or 64 bits, got {x.dtype}; a module casts activations to "
            "the dtype of a quantized weight: load the checkpoint with dequantize."
        )
    tokens = x.reshape(-1, x.shape[-1])
    how = quantized.Quantization(weight_scale, input_scale, activation, zero_point)
    with torch.cuda.device_of(x):
        out = quantized.run(tokens, weight, how, bias)
    return out.view(*x.shape[:-1], out.shape[-1])


define(
    quantized_linear,
    fake=lambda x, weight, **_: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
