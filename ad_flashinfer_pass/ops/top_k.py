"""``ad_flashinfer.top_k``: the largest numbers of each row, as a router asks for them."""

from __future__ import annotations

import torch
from torch import Tensor

from ad_flashinfer_pass.ops.define import define
from ad_flashinfer_pass.ops.launch import launching


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, the largest first; NaN is the largest.

    Args:
        x: [rows, columns], float32, bfloat16 or float16.
        k: at most as many as there are columns.

    Returns:
        Values [rows, k] in the dtype of x, and columns, int64 [rows, k]. Which of several equal numbers come
        first, or come at all, is no more promised than by torch.topk.
    """
    if x.device.type != "cuda":
        return torch.topk(x, k)
    from ad_flashinfer_pass.kernels.experts import top_k as kernel  # needs triton

    with launching(x.device):
        return kernel.run(x.contiguous(), k)


def _fake(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], k)), x.new_empty((x.shape[0], k), dtype=torch.int64)


define(top_k, fake=_fake)
