"""``ad_flashinfer.linear``: a linear of few tokens and what stands around it, by the fastest kernel."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.kernel_plan import KernelPlan
from ad_flashinfer_pass.kernels.linear.by_torch import by_torch
from ad_flashinfer_pass.kernels.linear.quantized import Quantization
from ad_flashinfer_pass.ops.define import define

KERNELS = {"torch": (0,), "small_gemm": (5,), "small_gemm_w8a8": (5,)}
"""The kernels that a plan may name, with the numbers of options that it takes."""


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
    weight_scale: Tensor | None = None,
    input_scale: Tensor | None = None,
    activation: str = "none",
    zero_point: Tensor | None = None,
    plan: str = "torch",
) -> Tensor:
    """residual + swiglu(rms_norm(x) weight^T + bias), each part but the product if it is asked for.

    With a weight_scale the linear is ``quantized_linear``. small_gemm then leaves activations in 16 bits
    (W8A16, W4A16), whatever ``activation`` says; small_gemm_w8a8 quantizes them.

    Args:
        x: [..., depth].
        weight: [rows, depth], contiguous.
        bias: [rows].
        norm: [depth]; x is divided by sqrt(mean(x^2) + eps) and multiplied by this.
        eps: of the norm.
        residual: [..., rows of the result], added to the result.
        gated: the result is silu(first half of the rows) * second half.
        weight_scale: see ``quantized_linear``, as the two that follow.
        input_scale: of activations.
        activation: how activations are quantized.
        zero_point: of integers of 4 bits.
        plan: torch, small_gemm or small_gemm_w8a8, by the number of tokens: a ``KernelPlan``. On a CPU it is
            torch.

    Returns:
        [..., rows], or [..., rows // 2] if gated, in the dtype of x.
    """
    tokens = x.reshape(-1, x.shape[-1])
    flat_residual = None if residual is None else residual.reshape(tokens.shape[0], -1).contiguous()
    around = (bias, norm, eps, flat_residual, gated)
    how = None if weight_scale is None else Quantization(weight_scale, input_scale, activation, zero_point)
    run = partial(by_torch, tokens, weight, *around, how)
    if x.device.type == "cuda":
        name, options = KernelPlan.parse(plan).at(tokens.shape[0])
        if name != "torch":
            from ad_flashinfer_pass.kernels.linear import small_gemm  # needs triton

            config, fused = small_gemm.Config(*options), small_gemm.Around(*around)
            is_w8a8 = name == "small_gemm_w8a8"
            run = partial(small_gemm.run, tokens.contiguous(), weight, fused, config, how, is_w8a8)
    with torch.cuda.device_of(x):
        out = run()
    return out.view(*x.shape[:-1], out.shape[-1])


define(
    linear,
    fake=lambda x, weight, gated, **_: x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if gated else 1))),
)
