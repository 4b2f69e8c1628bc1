"""``ad_flashinfer.top_k``: the largest numbers of each row and their softmax, as a router asks for them."""

from __future__ import annotations

import torch
from torch import Tensor

from ad_flashinfer_pass.ops.define import define
from ad_flashinfer_pass.ops.launch import launching

SOFTMAX = ("none", "all", "chosen")


def top_k(
    x: Tensor, k: int, softmax: str = "none", dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, the largest first; NaN is the largest.

    Args:
        x: [rows, columns], float32, bfloat16 or float16.
        k: at most as many as there are columns.
        softmax: none: values are those of x; all: of the softmax of the row; chosen: of the softmax of the k
            largest, which are those of ``all`` over their sum. Computed in float32 and rounded once.
        dtype: of the values; None: that of x, and float32 for a softmax.

    Returns:
        Values and columns, int64, both [rows, k]. Which of several equal numbers come first, or come at all,
        is no more promised than by torch.topk.

    Raises:
        ValueError: softmax is none of the three.
    """
    if softmax not in SOFTMAX:
        raise ValueError(f"top_k: softmax must be one of {', '.join(SOFTMAX)}, got {softmax!r}.")
    dtype = dtype or _dtype(x, softmax)
    if x.device.type != "cuda":
        values, index = torch.topk(x.float().softmax(-1) if softmax == "all" else x, k)
        return (values.float().softmax(-1) if softmax == "chosen" else values).to(dtype), index
    from ad_flashinfer_pass.kernels.experts import top_k as kernel  # needs triton

    with launching(x.device):
        return kernel.run(x.contiguous(), k, softmax, dtype)


def _dtype(x: Tensor, softmax: str) -> torch.dtype:
    return x.dtype if softmax == "none" else torch.float32


def _fake(x: Tensor, k: int, softmax: str, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    values = x.new_empty(shape, dtype=dtype or _dtype(x, softmax))
    return values, x.new_empty(shape, dtype=torch.int64)


define(top_k, fake=_fake)
