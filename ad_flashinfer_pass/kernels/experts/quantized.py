"""The products of experts whose weights are float8 or of 4 bits, by torch's kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.experts.by_torch import COPIED_BYTES, Product
from ad_flashinfer_pass.kernels.linear.float8 import dequantized, quantized


class Scales(NamedTuple):
    """Of one projection: the arguments of ``ops.quantized_experts``."""

    weight: Tensor
    input: Tensor | None
    """[num_experts]."""
    zero_point: Tensor | None = None


def products(
    expert: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Scales],
    quantization: str,
    dtype: torch.dtype,
) -> list[Product]:
    """For each weight the product of rows, sorted by expert, with their expert's.

    Args:
        expert: int [n], sorted.
        weights: each [num_experts, rows, depth], or of 4 bits [num_experts, rows, depth / 2].
        scales: as many.
        quantization: how rows are rounded before.
        dtype: of the results; summed in float32, or float64 if it is that.
    """
    counts = _counts(expert, weights[0].shape[0])
    return [
        partial(_product, expert, counts, weight, each, quantization, dtype)
        for weight, each in zip(weights, scales, strict=True)
    ]


def _counts(expert: Tensor, num_experts: int) -> list[int] | None:
    """Rows of each expert; None where a CUDA graph is captured, which knows no numbers."""
    if expert.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    counts: list[int] = torch.bincount(expert, minlength=num_experts).tolist()
    return counts


def _product(
    expert: Tensor,
    counts: list[int] | None,
    weight: Tensor,
    scales: Scales,
    quantization: str,
    dtype: torch.dtype,
    rows: Tensor,
) -> Tensor:
    exact = torch.promote_types(dtype, torch.float32)
    input_scale = None if scales.input is None else scales.input[expert][:, None]
    x = quantized(rows.to(exact), input_scale, quantization)
    out = rows.new_empty((rows.shape[0], weight.shape[1]), dtype=dtype)
    for part, chosen in _by_row(expert, weight) if counts is None else _by_expert(counts):
        zero_point = None if scales.zero_point is None else scales.zero_point[chosen]
        plain = dequantized(weight[chosen], scales.weight[chosen], exact, zero_point)
        out[part] = x[part] @ plain.mT if plain.ndim == 2 else torch.bmm(x[part, None], plain.mT)[:, 0]
    return out


def _by_expert(counts: list[int]) -> Iterator[tuple[slice, int]]:
    start = 0
    for number, count in enumerate(counts):
        if count:
            yield slice(start, start + count), number
        start += count


def _by_row(expert: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slow, but of a fixed number of launches: a CUDA graph can hold it."""
    step = max(1, COPIED_BYTES // (weight[0].numel() * 8))
    for start in range(0, len(expert), step):
        part = slice(start, start + step)
        yield part, expert[part]
