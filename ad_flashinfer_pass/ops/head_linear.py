"""``ad_flashinfer.head_linear``: a linear of each head, as ``cache_latent`` puts it around attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ad_flashinfer_pass.ops.define import define
from ad_flashinfer_pass.ops.launch import launching

MAX_TOKENS = 64
"""For which the kernel was made; cuBLAS has more of them."""


def head_linear(x: Tensor, weight: Tensor, rest: Tensor | None = None) -> Tensor:
    """x weight of each head, and what stands beside it in the result.

    Summed in float32, but for float64. On CUDA, in 16 bits and for few tokens, by a Triton kernel, elsewhere
    by torch.

    Args:
        x: [b, s, heads, depth], any strides.
        weight: [heads, depth, rows], any strides.
        rest: [b, s, heads, n], any strides.

    Returns:
        [b, s, heads, rows + n], contiguous, in the dtype of x.
    """
    tokens = x.flatten(0, 1)
    beside = None if rest is None else rest.flatten(0, 1)
    if x.device.type == "cuda" and len(tokens) <= MAX_TOKENS and x.dtype.itemsize == 2:
        from ad_flashinfer_pass.kernels.linear import head_linear as kernel  # needs triton

        with launching(x.device, weight=weight):
            return kernel.run(tokens, weight, beside).unflatten(0, x.shape[:2])
    out = torch.bmm(tokens.transpose(0, 1), weight).transpose(0, 1)
    out = out.contiguous() if beside is None else torch.cat((out, beside), -1)
    return out.unflatten(0, x.shape[:2])


def _fake(x: Tensor, weight: Tensor, rest: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[2] + (0 if rest is None else rest.shape[3])))


define(head_linear, fake=_fake)
