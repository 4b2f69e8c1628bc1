"""Linears of a few tokens, which are bound by reading the weight, together with what stands around them.

A decode step reads every weight once. cuBLAS reaches about 86 % of the memory's speed there; the two kernels
here are chosen instead where ``tune`` measured them to be faster. A norm before the product, SwiGLU
after it and the addition to the residual stream cost next to nothing inside, and a launch and a wait each
outside. Both kernels give each program whole rows of the weight, so that its reads are long and in order:

- ``_gemv``: one token. Products are summed in float32 registers, no tensor cores; the norm costs no pass of
  its own, since its scale can be applied to the sums.
- ``_skinny``: up to 64 tokens, of a weight of 4 bits up to 128. The weight's rows are the M of the tensor
  cores' product, the tokens its N. The inner dimension can be split among programs; the last to finish adds
  the parts, always in one order.

A float8 weight is read as it is stored. With activations of 16 bits it becomes 16 bits in registers, which is
exact (W8A16); ``_skinny`` takes activations in float8, too, as the tensor cores do (W8A8). Scales multiply
sums in float32. The loops over a weight of 4 bits (W4A16) are those of ``four_bit_sums``.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ad_flashinfer_pass.kernels import overlap, workspaces
from ad_flashinfer_pass.kernels.linear import float8
from ad_flashinfer_pass.kernels.linear.four_bit_sums import by_halves, row_sums, tile_sums, words_at_once
from ad_flashinfer_pass.kernels.linear.quantize import quantize
from ad_flashinfer_pass.kernels.linear.quantized import Quantization
from ad_flashinfer_pass.kernels.overlap import await_turn

MAX_TOKENS, MAX_TOKENS_OF_4_BITS = 64, 128
"""Beyond, a copy of a weight of 4 bits in 16 bits costs less than this kernel does."""
_SCALE_BLOCK = tl.constexpr(float8.BLOCK)
_PARTIALS, _COUNTERS = 2**24, 2**14
"""Elements of the workspace."""
_SHARED_BYTES = 220 * 1024
"""Shared memory that a program may ask for on compute capability 9.0, of 227 KiB."""
_OWN_SHARED_BYTES = 7 * 1024
"""What Triton may need beside it."""


class Around(NamedTuple):
    """What is computed beside x weight^T."""

    bias: Tensor | None = None
    """[rows of the weight]"""
    norm: Tensor | None = None
    """[depth]: x is first divided by its root mean square and multiplied by this."""
    eps: float = 0.0
    """Added to the mean square."""
    residual: Tensor | None = None
    """[tokens, rows of the result], contiguous: added to the result."""
    gated: bool = False
    """The result is silu(first half of the rows) * second half."""


class Config(NamedTuple):
    """A way to launch one of the kernels."""

    rows: int
    """Rows of the weight that a program computes."""
    depth: int
    """Elements of a row that are read at once."""
    split: int
    """Programs that share the rows; 1 for ``_gemv``."""
    warps: int
    stages: int


# Of 2,100 configurations that were timed for the weight shapes of Llama-3.1-8B and Qwen3-30B-A3B on an H200,
# those that were the best or next to it for some shape.
_OF_16_BITS = {
    1: [(1, 2048, 1, 8, 1), (1, 2048, 1, 4, 1), (2, 2048, 1, 8, 1), (1, 4096, 1, 8, 1), (2, 1024, 1, 4, 1)],
    16: [
        (32, 512, 1, 2, 4),
        (32, 512, 1, 2, 3),
        (16, 512, 1, 2, 3),
        (32, 256, 1, 2, 4),
        (64, 128, 1, 4, 4),
        (64, 128, 1, 4, 3),
        (64, 128, 4, 4, 4),
        (64, 256, 1, 4, 4),
    ],
    32: [
        (64, 128, 1, 4, 4),
        (128, 128, 1, 4, 4),
        (64, 128, 2, 4, 4),
        (64, 128, 2, 4, 6),
        (64, 256, 2, 4, 4),
        (32, 256, 1, 2, 3),
        (64, 128, 4, 4, 4),
        (64, 256, 1, 4, 4),
    ],
    64: [
        (128, 128, 1, 4, 4),
        (128, 128, 1, 8, 4),
        (64, 64, 1, 4, 6),
        (64, 128, 1, 4, 3),
        (64, 128, 1, 8, 4),
        (64, 128, 2, 4, 6),
        (64, 128, 2, 8, 4),
    ],
}


# Likewise, of 3,000 for Llama's shapes in float8.
_W8A16 = {
    1: [(4, 4096, 1, 4, 1), (2, 4096, 1, 2, 1), (8, 1024, 1, 4, 1), (4, 1024, 1, 2, 1), (8, 512, 1, 2, 1)],
    16: [(32, 256, 1, 2, 3), (32, 256, 4, 2, 3), (64, 128, 1, 4, 3), (64, 128, 4, 4, 5)],
    32: [(64, 128, 1, 4, 3), (64, 128, 4, 4, 3), (64, 128, 4, 4, 5), (64, 256, 4, 4, 3)],
    64: [(64, 128, 1, 4, 3), (64, 128, 4, 4, 3), (64, 128, 4, 4, 5)],
}
_W8A8 = {
    1: _W8A16[1],
    16: [(64, 256, 1, 4, 5), (64, 128, 1, 4, 3), (64, 256, 4, 4, 3), (64, 512, 1, 4, 3), (64, 512, 2, 4, 5)],
    32: [(64, 256, 1, 4, 5), (64, 256, 2, 4, 5), (128, 256, 1, 8, 3), (64, 128, 1, 4, 3)],
    64: [(64, 256, 1, 4, 5), (64, 256, 2, 4, 5), (64, 128, 1, 4, 3), (64, 512, 1, 4, 3)],
}
# Likewise, of 500 with groups of 128; those of depth 256, and gated ones that are split, were not among them.
_W4A16 = {
    1: [
        *[(8, 4096, 1, 4, 1), (8, 2048, 1, 2, 1), (4, 2048, 1, 2, 1), (4, 4096, 1, 2, 1), (4, 4096, 1, 4, 1)],
        (16, 2048, 1, 4, 1),
    ],
    16: [
        *[
            (128, 128, 8, 4, 3),
            (64, 128, 4, 4, 3),
            (128, 128, 1, 8, 3),
            (32, 128, 1, 2, 5),
            (128, 128, 8, 8, 7),
        ],
        *[(32, 256, 1, 2, 4), (64, 256, 4, 4, 3), (64, 128, 2, 4, 3)],
    ],
    32: [
        (128, 128, 4, 8, 3),
        (64, 128, 1, 4, 3),
        (128, 128, 8, 8, 3),
        (64, 256, 1, 4, 3),
        (64, 128, 2, 4, 3),
    ],
    64: [(128, 128, 1, 8, 3), (128, 128, 4, 8, 3), (128, 128, 2, 8, 3), (128, 128, 4, 4, 3)],
    128: [
        (128, 128, 1, 8, 3),
        (128, 128, 4, 8, 3),
        (128, 128, 2, 8, 3),
        (64, 128, 1, 4, 3),
        (64, 128, 4, 4, 3),
    ],
}
_CANDIDATES = {"w16a16": _OF_16_BITS, "w8a16": _W8A16, "w8a8": _W8A8, "w4a16": _W4A16}
Numbers = Literal["w16a16", "w8a16", "w8a8", "w4a16"]
"""Bits of an element of the weight and of an activation."""


def candidates(
    num_tokens: int,
    rows: int,
    depth: int,
    gated: bool = False,
    numbers: Numbers = "w16a16",
    by_blocks: bool = False,
    group: int = 0,
    shared_bytes: int = _SHARED_BYTES,
) -> list[Config]:
    """The configurations worth timing; none beyond ``max_tokens``.

    Args:
        num_tokens: of the step.
        rows: of the result.
        depth: of the weight.
        gated: see ``Around``.
        numbers: what is multiplied.
        by_blocks: each block of the weight has a scale.
        group: elements of a row that share a scale, of 4 bits.
        shared_bytes: that a program may ask for, see ``shared_bytes_of``.
    """
    configs = all_candidates(num_tokens, numbers)
    if numbers == "w4a16" and num_tokens > 1:
        step = 4 * words_at_once(group, depth)  # in place of 128
        configs = [config._replace(depth=config.depth // 128 * step) for config in configs]
    fits = partial(_fits, num_tokens, rows, depth, gated, numbers, by_blocks, shared_bytes=shared_bytes)
    return [config for config in configs if num_tokens == 1 or fits(config)]


def all_candidates(num_tokens: int, numbers: Numbers = "w16a16") -> list[Config]:
    """Those of ``candidates`` for any result."""
    if num_tokens > max_tokens(numbers):
        return []
    by_tokens = _CANDIDATES[numbers]
    return [Config(*values) for values in by_tokens[token_block(num_tokens)]]


def max_tokens(numbers: Numbers) -> int:
    """The most for which there are candidates."""
    return MAX_TOKENS_OF_4_BITS if numbers == "w4a16" else MAX_TOKENS


def shared_bytes_of(device: torch.device) -> int:
    """Shared memory that a program may ask for on a device."""
    if device.type != "cuda":
        return _SHARED_BYTES
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - _OWN_SHARED_BYTES


def _fits(
    num_tokens: int,
    rows: int,
    depth: int,
    gated: bool,
    numbers: Numbers,
    by_blocks: bool,
    config: Config,
    shared_bytes: int = _SHARED_BYTES,
) -> bool:
    weight_bits, x_bits = map(int, numbers[1:].split("a"))
    tile_bits = config.depth * (weight_bits * config.rows * (1 + gated) + x_bits * token_block(num_tokens))
    if depth % (config.depth * config.split) or tile_bits // 8 * config.stages > shared_bytes:
        return False
    if by_blocks and max(config.rows, config.depth) > float8.BLOCK:
        return False
    tiles = triton.cdiv(rows, config.rows)
    has_space = tiles <= _COUNTERS and num_tokens * rows * (1 + gated) * config.split <= _PARTIALS
    return config.split == 1 or has_space


def token_block(num_tokens: int) -> int:
    """The number of tokens to which a step is padded: a power of two, at least 16; 1 alone is not."""
    return 1 if num_tokens == 1 else max(16, int(triton.next_power_of_2(num_tokens)))


def run(
    x: Tensor,
    weight: Tensor,
    around: Around,
    config: Config,
    quantization: Quantization | None = None,
    is_w8a8: bool = False,
) -> Tensor:
    """``ops.linear`` in one kernel; of several tokens in two if there is a norm, or float8 activations.

    Args:
        x: [tokens, depth], contiguous, at most ``max_tokens`` tokens.
        weight: [rows, depth], contiguous; float8_e4m3fn with a scale, 4 bits, else of the dtype of x.
        around: what else is computed.
        config: one of ``candidates``.
        quantization: of a float8 or 4-bit weight.
        is_w8a8: activations are quantized as it says; of more than one token, with a scale of each, or of
            all.

    Returns:
        [tokens, rows], or [tokens, rows // 2] if gated, in the dtype of x.
    """
    (num_tokens, depth), rows = x.shape, weight.shape[0] // (2 if around.gated else 1)
    out = torch.empty((num_tokens, rows), dtype=x.dtype, device=x.device)
    scale = None if quantization is None else quantization.weight_scale.contiguous()
    by_blocks, group = quantization is not None and quantization.scaling(weight) == "block", 0
    norm = around.norm
    if scale is not None and weight.dtype == torch.uint8:
        weight, group = weight.view(torch.int32 if num_tokens == 1 else torch.int16), depth // scale.shape[1]
        if num_tokens == 1:
            x, norm = x.view(torch.int32), None if norm is None else norm.view(torch.int32)
    scaling = {
        "scale": scale,
        "scale_stride": int(scale is not None and scale.numel() > 1),
        "zero": None if quantization is None else quantization.zero_point,
        "BY_BLOCKS": by_blocks,
        "GROUP": group,
        "BY_ASSEMBLY": x.device.type == "cuda",
    }
    if num_tokens == 1:
        _gemv[(triton.cdiv(rows, config.rows),)](
            x,
            weight,
            around.bias,
            norm,
            around.residual,
            out,
            rows,
            around.eps,
            DEPTH=depth,
            ROWS=config.rows,
            BLOCK=config.depth,
            GATED=around.gated,
            **scaling,
            num_warps=config.warps,
        )
        return out
    token_scale = None
    if quantization is not None and is_w8a8:
        x, token_scale = quantize(x, quantization.input_scale, around.norm, around.eps)
    elif around.norm is not None:
        x = rms_norm(x, around.norm, around.eps)
    space = workspaces.get(_workspace, x.device)
    _skinny[(triton.cdiv(rows, config.rows), config.split)](
        x,
        weight,
        around.bias,
        around.residual,
        token_scale,
        out,
        space.partials,
        space.counters,
        num_tokens,
        rows,
        DEPTH=depth,
        ROWS=config.rows,
        TOKENS=token_block(num_tokens),
        BLOCK=config.depth,
        SPLIT=config.split,
        GATED=around.gated,
        K=words_at_once(group, depth),
        **scaling,
        num_warps=config.warps,
        num_stages=config.stages,
        **overlap.options(x.device, num_tokens),
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 and rounded once.

    Args:
        x: [tokens, depth], contiguous.
        weight: [depth].
        eps: added to the mean square.
    """
    out = torch.empty_like(x)
    depth = x.shape[1]
    _rms_norm[(x.shape[0],)](
        x,
        weight,
        out,
        eps,
        DEPTH=depth,
        BLOCK=triton.next_power_of_2(depth),
        num_warps=8,
        **overlap.options(x.device, x.shape[0]),
    )
    return out


class _Workspace(NamedTuple):
    partials: Tensor
    counters: Tensor
    """Zero before and after each launch."""


def _workspace(device: torch.device) -> _Workspace:
    """For one stream at a time; never grows, so that captured graphs may keep its address."""
    return _Workspace(
        torch.empty(_PARTIALS, dtype=torch.float32, device=device),
        torch.zeros(_COUNTERS, dtype=torch.int32, device=device),
    )


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    eps,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_turn(OVERLAPS)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < DEPTH
    row = tl.program_id(0).to(tl.int64) * DEPTH
    v = tl.load(x + row + lanes, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / DEPTH + eps)
    v *= scale * tl.load(weight + lanes, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + lanes, v.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _scale_row(row, DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the scales of a row's blocks begin."""
    return row // _SCALE_BLOCK * ((DEPTH + _SCALE_BLOCK - 1) // _SCALE_BLOCK)


@triton.jit
def _gemv(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    norm,
    residual,
    out,
    num_rows,
    eps,
    scale,
    scale_stride,
    zero,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    BY_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    BY_ASSEMBLY: tl.constexpr,
):
    """ROWS rows of the result for one token; a gated row is two of the weight, num_rows apart."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    if GROUP:
        IS_BFLOAT16: tl.constexpr = out.dtype.element_ty == tl.bfloat16
        EACH: tl.constexpr = 2 if GATED else 1
        # Those of gate and up in turn.
        both = tl.arange(0, ROWS * EACH)
        its_rows = tl.program_id(0) * ROWS + both // EACH
        its_mask = its_rows < num_rows
        its_rows += both % EACH * num_rows
        words, groups = its_rows.to(tl.int64) * (DEPTH // 8), its_rows * (DEPTH // GROUP)
        sums, squares = row_sums(
            weight, words, scale, groups, zero, groups, its_mask, x, norm,
            DEPTH, ROWS * EACH, BLOCK, GROUP, IS_BFLOAT16, BY_ASSEMBLY,
        )  # fmt: skip
        if GATED:
            total, up = by_halves(sums, ROWS)
        else:
            total = tl.sum(sums, axis=1)
            up = total
    else:
        lanes = tl.arange(0, BLOCK)
        weights = weight + rows.to(tl.int64)[:, None] * DEPTH + lanes[None, :]
        sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        ups = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, DEPTH, BLOCK):
            lane_mask = start + lanes < DEPTH
            mask = row_mask[:, None] & lane_mask[None, :]
            w = tl.load(weights + start, mask=mask, other=0.0, eviction_policy="evict_first")
            v = tl.load(x + start + lanes, mask=lane_mask, other=0.0).to(tl.float32)
            if norm is not None:
                squares += v * v
                v *= tl.load(norm + start + lanes, mask=lane_mask, other=0.0).to(tl.float32)
            scaled = v
            if BY_BLOCKS:
                scales = scale + _scale_row(tl.program_id(0) * ROWS, DEPTH) + (start + lanes) // _SCALE_BLOCK
                scaled = v * tl.load(scales, mask=lane_mask, other=0.0).to(tl.float32)
            sums += w.to(tl.float32) * scaled[None, :]
            if GATED:
                up = weights + start + num_rows.to(tl.int64) * DEPTH
                w = tl.load(up, mask=mask, other=0.0, eviction_policy="evict_first")
                if BY_BLOCKS:
                    scales += _scale_row(num_rows, DEPTH)
                    scaled = v * tl.load(scales, mask=lane_mask, other=0.0).to(tl.float32)
                ups += w.to(tl.float32) * scaled[None, :]
        squares = tl.sum(squares, axis=0)
    # A sum over lanes waits for its loads, and what follows for it: x comes first, the weights after it.
    factor = 1.0
    if norm is not None:
        factor = tl.rsqrt(squares / DEPTH + eps)
    if not GROUP:
        total = tl.sum(sums, axis=1)
    total *= factor
    if scale is not None and not BY_BLOCKS and not GROUP:
        total *= tl.load(scale + rows * scale_stride, mask=row_mask, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)
    if GATED:
        if not GROUP:
            up = tl.sum(ups, axis=1)
        up *= factor
        if scale is not None and not BY_BLOCKS and not GROUP:
            up *= tl.load(scale + (num_rows + rows) * scale_stride, mask=row_mask, other=0.0).to(tl.float32)
        if bias is not None:
            up += tl.load(bias + num_rows + rows, mask=row_mask, other=0.0).to(tl.float32)
        total = total * tl.sigmoid(total) * up
    if residual is not None:
        total += tl.load(residual + rows, mask=row_mask, other=0.0).to(tl.float32)
    tl.store(out + rows, total.to(out.dtype.element_ty), mask=row_mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _skinny(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    residual,
    token_scale,
    out,
    partials,
    counters,
    num_tokens,
    num_rows,
    scale,
    scale_stride,
    zero,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
    BY_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BY_ASSEMBLY: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """ROWS rows of the result for all tokens, over a part of the depth."""
    await_turn(OVERLAPS)
    tile, part = tl.program_id(0), tl.program_id(1)
    rows = tile * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    row_mask, token_mask = rows < num_rows, tokens < num_tokens
    if GROUP:
        words = rows.to(tl.int64) * (DEPTH // 4)
        groups, first = rows * (DEPTH // GROUP), part * (DEPTH // SPLIT)
        sums, ups = tile_sums(
            weight, weight + num_rows.to(tl.int64) * (DEPTH // 4), words,
            scale, scale + num_rows * (DEPTH // GROUP), groups,
            zero, None if zero is None else zero + num_rows * (DEPTH // GROUP), row_mask,
            x, tokens * DEPTH, token_mask, first,
            DEPTH // SPLIT, ROWS, TOKENS, GROUP, BLOCK, K, GATED, BY_ASSEMBLY,
        )  # fmt: skip
    else:
        sums, ups = _tile_sums(
            weight, rows, row_mask, num_rows, scale, x, tokens, token_mask, part,
            DEPTH, ROWS, TOKENS, BLOCK, SPLIT, GATED, BY_BLOCKS,
        )  # fmt: skip
    places = tokens[None, :] * num_rows + rows[:, None]
    mask = row_mask[:, None] & token_mask[None, :]
    is_last = True
    if SPLIT > 1:
        EACH: tl.constexpr = 2 if GATED else 1
        size = num_tokens * num_rows
        tl.store(partials + part * EACH * size + places, sums, mask=mask)
        if GATED:
            tl.store(partials + (part * EACH + 1) * size + places, ups, mask=mask)
        tl.debug_barrier()
        is_last = tl.atomic_add(counters + tile, 1) == SPLIT - 1
        if is_last:
            tl.store(counters + tile, 0)
            sums = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            ups = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            for other in tl.static_range(SPLIT):
                parts = partials + other * EACH * size + places
                sums += tl.load(parts, mask=mask, other=0.0, cache_modifier=".cg")
                if GATED:
                    ups += tl.load(parts + size, mask=mask, other=0.0, cache_modifier=".cg")
    if is_last:
        if token_scale is not None:
            factors = tl.load(token_scale + tokens, mask=token_mask, other=0.0)[None, :]
            sums *= factors
            ups *= factors
        if scale is not None and not BY_BLOCKS and not GROUP:
            sums *= tl.load(scale + rows * scale_stride, mask=row_mask, other=0.0).to(tl.float32)[:, None]
            if GATED:
                row_scales = scale + (num_rows + rows) * scale_stride
                ups *= tl.load(row_scales, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        if bias is not None:
            sums += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        if GATED:
            if bias is not None:
                ups += tl.load(bias + num_rows + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
            sums = sums * tl.sigmoid(sums) * ups
        if residual is not None:
            sums += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + places, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _tile_sums(  # type: ignore[no-untyped-def]
    weight,
    rows,
    row_mask,
    num_rows,
    scale,
    x,
    tokens,
    token_mask,
    part,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
    BY_BLOCKS: tl.constexpr,
):
    """Products of rows and of those num_rows beyond with all tokens, over a part of the depth."""
    lanes = part * (DEPTH // SPLIT) + tl.arange(0, BLOCK)
    weights = weight + rows.to(tl.int64)[:, None] * DEPTH + lanes[None, :]
    inputs = x + tokens[None, :] * DEPTH + lanes[:, None]
    sums = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    ups = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for start in range(0, DEPTH // SPLIT, BLOCK):
        w = tl.load(weights + start, mask=row_mask[:, None], other=0.0, eviction_policy="evict_first")
        v = tl.load(inputs + start, mask=token_mask[None, :], other=0.0)
        if BY_BLOCKS:
            lane = part * (DEPTH // SPLIT) + start
            scales = scale + _scale_row(tl.program_id(0) * ROWS, DEPTH) + lane // _SCALE_BLOCK
            sums += tl.dot(w.to(v.dtype), v) * tl.load(scales).to(tl.float32)
        else:
            sums = tl.dot(w.to(v.dtype), v, sums)
        if GATED:
            up = weights + start + num_rows.to(tl.int64) * DEPTH
            w = tl.load(up, mask=row_mask[:, None], other=0.0, eviction_policy="evict_first")
            if BY_BLOCKS:
                scales += _scale_row(num_rows, DEPTH)
                ups += tl.dot(w.to(v.dtype), v) * tl.load(scales).to(tl.float32)
            else:
                ups = tl.dot(w.to(v.dtype), v, ups)
    return sums, ups
