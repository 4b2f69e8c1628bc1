"""``ad_flashinfer.quantize``: activations as float8 with scales, and the norm or gate that makes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass.kernels.linear.float8 import LARGEST
from ad_flashinfer_pass.ops.define import define
from ad_flashinfer_pass.ops.launch import launching


def quantize(
    x: Tensor,
    input_scale: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """round(clamp(y / s, -448, 448)), where y is x, its RMSNorm, or silu(first half) * second half.

    Computed in float32 and rounded once, to float8_e4m3fn, to nearest, ties to even.

    Args:
        x: [..., depth], or [..., 2 * depth] if gated; bfloat16 or float16.
        input_scale: [] or [1], the s of all; None: of each token its largest magnitude / 448, 1 if that is 0.
        norm: [depth]; y is x / sqrt(mean(x^2) + eps) * norm.
        eps: added to the mean square.
        gated: not together with a norm.

    Returns:
        float8_e4m3fn [..., depth], and s, float32 [..., 1].
    """
    if x.device.type == "cuda":
        from ad_flashinfer_pass.kernels.linear import quantize as kernel  # needs triton

        flat = x.reshape(-1, x.shape[-1])
        with launching(x.device):
            values, scale = kernel.quantize(flat.contiguous(), input_scale, norm, eps, gated)
        return values.view(*x.shape[:-1], -1), scale.view(*x.shape[:-1], 1)
    y = x.float()
    if norm is not None:
        y = F.rms_norm(y, norm.shape, norm.float(), eps)
    if gated:
        first, second = y.chunk(2, -1)
        y = F.silu(first) * second
    if input_scale is None:
        scale = y.abs().amax(-1, keepdim=True) / LARGEST
        scale = scale.masked_fill(scale == 0, 1.0)
    else:
        scale = input_scale.float().reshape(1).expand(*y.shape[:-1], 1).contiguous()
    return (y / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def _fake(x: Tensor, gated: bool, **_: object) -> tuple[Tensor, Tensor]:
    *sizes, depth = x.shape
    values = x.new_empty((*sizes, depth // 2 if gated else depth), dtype=torch.float8_e4m3fn)
    return values, x.new_empty((*sizes, 1), dtype=torch.float32)


define(quantize, fake=_fake)
