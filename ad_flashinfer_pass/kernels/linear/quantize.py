"""Float8 and back on a GPU, in one kernel each: activations are quantized, weights become 16 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ad_flashinfer_pass.kernels import overlap
from ad_flashinfer_pass.kernels.linear import float8, four_bits
from ad_flashinfer_pass.kernels.linear.four_bit_sums import numbers_of, scales_of, zeros_of
from ad_flashinfer_pass.kernels.overlap import await_turn

_LARGEST = tl.constexpr(float8.LARGEST)
_SCALE_BLOCK = tl.constexpr(float8.BLOCK)
_WORDS_BLOCK = tl.constexpr(four_bits.BLOCK)
_NAN = tl.constexpr(tl.PropagateNan.ALL)
"""What is not a number stays so, as by torch: cut to the largest, it would be one."""
_ROWS, _COLUMNS = 16, 512
_LANES = 1024
_ROWS_OF_WORDS, _BLOCKS = 4, 32
"""Of 4 bits."""


def quantize(
    x: Tensor, scale: Tensor | None, norm: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """round(clamp(x / s, -448, 448)) as ``ops.quantized_linear`` has it.

    Args:
        x: [tokens, depth], contiguous, bfloat16 or float16, on a CUDA device.
        scale: one number, the s of all tokens; None: of each token its largest magnitude / 448.
        norm: [depth]; x is first divided by its root mean square and multiplied by this, in float32.
        eps: added to the mean square.

    Returns:
        float8_e4m3fn [tokens, depth], and s, float32 [tokens, 1].
    """
    num_tokens, depth = x.shape
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty((num_tokens, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(depth)
    _quantize[(num_tokens,)](
        x,
        scale,
        norm,
        values,
        scales,
        eps,
        depth,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
        **overlap.options(x.device, num_tokens),
    )
    return values, scales


def expand(weight: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None) -> Tensor:
    """``float8.dequantized`` without a copy in float32.

    Args:
        weight: float8_e4m3fn [rows, depth] or 4 bits, contiguous, on a CUDA device.
        scale: see ``ops.quantized_linear``.
        dtype: bfloat16 or float16.
        zero_point: of integers of 4 bits.
    """
    if weight.dtype == torch.uint8:
        return _expand_4_bits(weight, scale.contiguous(), dtype, zero_point)
    rows, depth = weight.shape
    out = torch.empty_like(weight, dtype=dtype)
    _expand[(triton.cdiv(rows, _ROWS), triton.cdiv(depth, _COLUMNS))](
        weight,
        scale.contiguous(),
        out,
        rows,
        depth,
        int(scale.numel() > 1),
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        BY_BLOCKS=float8.is_by_blocks(weight, scale),
    )
    return out


def _expand_4_bits(weight: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None) -> Tensor:
    if not four_bits.has_kernels(weight, scale):
        return four_bits.dequantized(weight, scale, zero_point, dtype)
    rows, depth = len(weight), 2 * weight.shape[1]
    out = torch.empty((rows, depth), dtype=dtype, device=weight.device)
    tiles = (triton.cdiv(rows, _ROWS_OF_WORDS), triton.cdiv(depth, _BLOCKS * four_bits.BLOCK))
    _expand_words[tiles](
        weight.view(torch.int16),
        scale,
        None if zero_point is None else zero_point.contiguous(),
        out,
        rows,
        DEPTH=depth,
        GROUP=depth // scale.shape[1],
        ROWS=_ROWS_OF_WORDS,
        BLOCKS=_BLOCKS,
        BY_ASSEMBLY=weight.device.type == "cuda",
    )
    return out


def rescale(sums: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """sums * scale * weight_scale + bias, in float32, in place.

    Args:
        sums: [tokens, rows], contiguous, bfloat16 or float16, on a CUDA device.
        scale: float32, of each token, or one.
        weight_scale: float32, of each row, or one.
        bias: [rows].
    """
    num_tokens, rows = sums.shape
    _rescale[(num_tokens, triton.cdiv(rows, _LANES))](
        sums,
        scale,
        weight_scale,
        bias,
        rows,
        int(scale.numel() > 1),
        int(weight_scale.numel() > 1),
        LANES=_LANES,
        **overlap.options(sums.device, num_tokens),
    )
    return sums


@triton.jit
def _rescale(  # type: ignore[no-untyped-def]
    sums,
    scale,
    weight_scale,
    bias,
    num_rows,
    scale_stride,
    weight_stride,
    LANES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_turn(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask, places = rows < num_rows, sums + token * num_rows + rows
    v = tl.load(places, mask=mask, other=0.0).to(tl.float32) * tl.load(scale + token * scale_stride)
    v *= tl.load(weight_scale + rows * weight_stride, mask=mask, other=0.0)
    if bias is not None:
        v += tl.load(bias + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(places, v.to(sums.dtype.element_ty), mask=mask)


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x, scale, norm, values, scales, eps, depth, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    await_turn(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < depth
    v = tl.load(x + token * depth + lanes, mask=mask, other=0.0).to(tl.float32)
    if norm is not None:
        v *= tl.rsqrt(tl.sum(v * v, axis=0) / depth + eps)
        v *= tl.load(norm + lanes, mask=mask, other=0.0).to(tl.float32)
    if scale is not None:
        s = tl.load(scale).to(tl.float32)
    else:
        s = tl.div_rn(tl.max(tl.abs(v), axis=0), _LARGEST)
        s = tl.where(s == 0.0, 1.0, s)
    v = tl.maximum(tl.div_rn(v, s), -_LARGEST, propagate_nan=_NAN)
    v = tl.minimum(v, _LARGEST, propagate_nan=_NAN)
    tl.store(values + token * depth + lanes, v.to(values.dtype.element_ty), mask=mask)
    tl.store(scales + token, s)


@triton.jit
def _expand(  # type: ignore[no-untyped-def]
    weight,
    scale,
    out,
    num_rows,
    depth,
    scale_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BY_BLOCKS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < depth)[None, :]
    places = rows.to(tl.int64)[:, None] * depth + columns[None, :]
    w = tl.load(weight + places, mask=mask, other=0.0).to(tl.float32)
    if BY_BLOCKS:
        row = tl.program_id(0) * ROWS // _SCALE_BLOCK * tl.cdiv(depth, _SCALE_BLOCK)
        s = tl.load(scale + row + columns // _SCALE_BLOCK, mask=columns < depth, other=0.0)
        w *= s.to(tl.float32)[None, :]
    else:
        s = tl.load(scale + rows * scale_stride, mask=rows < num_rows, other=0.0)
        w *= s.to(tl.float32)[:, None]
    tl.store(out + places, w.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _expand_words(  # type: ignore[no-untyped-def]
    weight,
    scale,
    zero,
    out,
    num_rows,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BY_ASSEMBLY: tl.constexpr,
):
    """Of ROWS rows, BLOCKS blocks of ``four_bits.pack``; words of a block share the reading of a scale."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    IS_FLOAT: tl.constexpr = scale.dtype.element_ty == tl.uint8
    PLACES: tl.constexpr = 2 if GROUP < _WORDS_BLOCK else 4
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    blocks = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[None, :]
    block_mask = (rows < num_rows) & (blocks < DEPTH // _WORDS_BLOCK)
    lanes, mask = tl.arange(0, 16)[None, None, :], block_mask[:, :, None]
    starts = (rows * DEPTH + blocks * _WORDS_BLOCK)[:, :, None]
    w = tl.load(weight + (starts // 4 + lanes), mask=mask, other=0)
    for first in tl.static_range(0, 4, PLACES):
        groups = rows * (DEPTH // GROUP) + (blocks * _WORDS_BLOCK + 16 * first) // GROUP
        factors = scales_of(scale, groups, block_mask)[:, :, None]
        zeros = tl.broadcast_to(zeros_of(zero, groups, block_mask, DTYPE)[:, :, None], w.shape)
        for place in tl.static_range(first, first + PLACES):
            values = numbers_of(w, zeros, place, DTYPE, IS_FLOAT, BY_ASSEMBLY).to(tl.float32) * factors
            tl.store(out + (starts + 16 * place + lanes), values.to(DTYPE), mask=mask)
