"""Attention over a latent: W_UK is absorbed into the query, and W_UV into the result.

q^T (W_UK c) = (W_UK^T q)^T c, and a sum of W_UV c with weights is W_UV times that sum of c: the same reals,
so that what attends over the rows of one head does for all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec

MAX_TOKENS = 64
"""For which the kernel of ``head_linear`` was made; cuBLAS has more of them."""


def absorbing(attend: Callable[..., Tensor], spec: AttentionSpec) -> Callable[..., Tensor]:
    """A function of a provider, for the query [tokens, heads, n + rest] of heads that share a latent.

    Args:
        attend: of the query that has absorbed key_up, [tokens, heads, rank + rest].
        spec: ``attend`` is given back as it is if it has no key_up.
    """
    if spec.key_up is None or spec.value_up is None:
        return attend
    return partial(_absorbed, attend, spec.key_up, spec.value_up)


def _absorbed(
    attend: Callable[..., Tensor], key_up: Tensor, value_up: Tensor, query: Tensor, *args: Any, **options: Any
) -> Tensor:
    size = key_up.shape[1]
    attended = attend(head_linear(query[..., :size], key_up, query[..., size:]), *args, **options)
    return head_linear(attended, value_up.mT)


def head_linear(x: Tensor, weight: Tensor, rest: Tensor | None = None) -> Tensor:
    """x weight of each head, and what stands beside it in the result.

    Summed in float32, but for float64. On CUDA, in 16 bits and for few tokens, by a Triton kernel, elsewhere
    by torch.

    Args:
        x: [tokens, heads, depth], any strides.
        weight: [heads, depth, rows], any strides.
        rest: [tokens, heads, n], any strides.

    Returns:
        [tokens, heads, rows + n], contiguous, in the dtype of x.
    """
    if x.device.type == "cuda" and len(x) <= MAX_TOKENS and x.dtype.itemsize == 2:
        from ad_flashinfer_pass.kernels.linear import head_linear as kernel  # needs triton

        return kernel.run(x, weight, rest)
    out = torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)
    return out.contiguous() if rest is None else torch.cat((out, rest), -1)
