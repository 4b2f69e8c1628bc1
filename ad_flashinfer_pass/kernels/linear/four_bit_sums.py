"""Rows of a weight of 4 bits times x, in Triton: the loops of ``small_gemm`` and of the experts' kernels.

A weight is read in words of 16 bits, as ``four_bits.pack`` lays them out: word j of a block of 64 elements
has the elements j, j + 16, j + 32 and j + 48, so that what multiplies the same part of all words lies in
order. Numbers become floats by their bits, exactly: an integer is set into the mantissa of a power of two,
which is then subtracted; the bits of e2m1 are those of a very small float of more bits. The sums of a group
are multiplied by its scale, all in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ad_flashinfer_pass.kernels.linear import four_bits

_BLOCK = tl.constexpr(four_bits.BLOCK)
_ZERO_POINT = tl.constexpr(four_bits.ZERO_POINT)
_UP, _DOWN = tl.constexpr(2.0**64), tl.constexpr(2.0**62)
"""e2m1 in the bits of a float32 is its number times 2^-126; so that products stay normal, x is raised."""


def words_at_once(group: int, depth: int) -> int:
    """The K of ``tile_sums``, words of 16 bits, for groups and rows of so many elements."""
    return 32 if group % 128 == 0 and depth % 128 == 0 else 16


@triton.constexpr_function
def _assembly(place: int, is_float: bool, is_bfloat16: bool) -> str:
    """Of two words $1 the numbers at a place, as two floats of 16 bits; of integers minus $2."""
    down = 4 * place
    if not is_float:
        magic, kind = ("0x43004300", "bf16x2") if is_bfloat16 else ("0x64006400", "f16x2")
        return (
            f"{{.reg .b32 t; shr.u32 t, $1, {down}; lop3.b32 t, t, 0x000F000F, {magic}, 0xEA; "
            f"sub.{kind} $0, t, $2;}}"
        )
    up, mask, factor, kind = (6, "0x01C001C0", "0x7E807E80", "bf16x2")  # 2^126
    if not is_bfloat16:
        up, mask, factor, kind = (9, "0x0E000E00", "0x74007400", "f16x2")  # 2^14
    shift = f"shl.b32 t, $1, {up - down}" if up >= down else f"shr.u32 t, $1, {down - up}"
    return (
        f"{{.reg .b32 t, s, f; {shift}; and.b32 t, t, {mask}; shl.b32 s, $1, {12 - down}; "
        f"lop3.b32 t, s, 0x80008000, t, 0xEA; mov.b32 f, {factor}; mul.{kind} $0, t, f;}}"
    )


@triton.jit
def numbers_of(  # type: ignore[no-untyped-def]
    words,
    zero,
    PLACE: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BY_ASSEMBLY: tl.constexpr,
):
    """The numbers at a place of words [rows, k], as DTYPE; zero has those of integers, from ``zeros_of``."""
    if BY_ASSEMBLY:
        CODE: tl.constexpr = _assembly(PLACE, IS_FLOAT, tl.bfloat16 == DTYPE)
        if IS_FLOAT:
            values = tl.inline_asm_elementwise(CODE, "=r,r", [words], dtype=DTYPE.value, is_pure=True, pack=2)
        else:
            args = [words, zero]
            values = tl.inline_asm_elementwise(CODE, "=r,r,r", args, dtype=DTYPE.value, is_pure=True, pack=2)
    else:
        numbers = (words.to(tl.int32) >> (4 * PLACE)) & 15
        if IS_FLOAT:
            exponent = (numbers >> 1) & 3
            has_one = (exponent > 0).to(tl.int32)
            halves = (((numbers & 1) + 2 * has_one) << exponent) >> has_one
            wide = halves.to(tl.float32) * tl.where(numbers >= 8, -0.5, 0.5)
        else:
            wide = (numbers - (zero & 15).to(tl.int32)).to(tl.float32)
        values = wide.to(DTYPE)
    return values


@triton.jit
def zeros_of(zero, places, mask, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Zero points in the mantissa of a power of two, as words."""
    MAGIC: tl.constexpr = 0x4300 if tl.bfloat16 == DTYPE else 0x6400
    if zero is None:
        zeros = tl.full(places.shape, MAGIC + _ZERO_POINT, dtype=tl.int16)
    else:
        zeros = tl.load(zero + places, mask=mask, other=0).to(tl.int16) | MAGIC
    return zeros


@triton.jit
def scales_of(scale, places, mask):  # type: ignore[no-untyped-def]
    """Scales in float32; bytes are exponents of 2, plus 127."""
    values = tl.load(scale + places, mask=mask, other=0)
    if scale.dtype.element_ty == tl.uint8:
        bits = values.to(tl.int32) << 23
        return tl.where(bits == 0, 1 << 22, bits).to(tl.float32, bitcast=True)  # 2^-127 is not normal
    return values.to(tl.float32)


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    sums,
    weight,
    words,
    scale,
    groups,
    zero,
    row_mask,
    x,
    inputs,
    input_mask,
    start,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BY_ASSEMBLY: tl.constexpr,
):
    """``sums`` and 4 K products more for each row and token."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    IS_FLOAT: tl.constexpr = scale.dtype.element_ty == tl.uint8
    PLACES: tl.constexpr = 2 if GROUP < _BLOCK else 4
    w = tl.load(weight + words + start // 4, mask=row_mask[:, None], other=0, eviction_policy="evict_first")
    for first in tl.static_range(0, 4, PLACES):
        group = groups + (start + 16 * first) // GROUP
        factors = scales_of(scale, group, row_mask)
        zeros = tl.broadcast_to(zeros_of(zero, group, row_mask, DTYPE)[:, None], w.shape)
        part = tl.zeros(sums.shape, dtype=tl.float32)
        for place in tl.static_range(first, first + PLACES):
            v = tl.load(x + inputs + (start + 16 * place), mask=input_mask, other=0.0)
            part = tl.dot(numbers_of(w, zeros, place, DTYPE, IS_FLOAT, BY_ASSEMBLY), v, part)
        sums += part * factors[:, None]
    return sums


@triton.jit
def tile_sums(  # type: ignore[no-untyped-def]
    weight,
    up_weight,
    row_words,
    scale,
    up_scale,
    row_groups,
    zero,
    up_zero,
    row_mask,
    x,
    token_elements,
    token_mask,
    first,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BY_ASSEMBLY: tl.constexpr,
):
    """Products of ROWS rows with TOKENS tokens over COUNT elements from ``first`` on, by the tensor cores.

    Args:
        weight: in words of 16 bits.
        up_weight: another whose rows lie as those of weight, if GATED.
        row_words: [ROWS], where in weight a row begins.
        scale: of groups of GROUP elements.
        up_scale: as scale, of up_weight.
        row_groups: [ROWS], where in scale a row begins.
        zero: zero points, or None; lie as scale.
        up_zero: likewise.
        row_mask: [ROWS].
        x: bfloat16 or float16.
        token_elements: [TOKENS], where in x a token begins.
        token_mask: [TOKENS].
        first: element of the rows.
        COUNT: elements, a multiple of BLOCK.
        ROWS: of a tile.
        TOKENS: of a tile.
        GROUP: 32, or a multiple of 64.
        BLOCK: elements of a turn of the loop, a multiple of 4 K.
        K: words that are read at once, of ``words_at_once``.
        GATED: there is up_weight.
        BY_ASSEMBLY: for NVIDIA's GPUs.

    Returns:
        Two of float32 [ROWS, TOKENS], the second of up_weight.
    """
    lanes = tl.arange(0, K)
    words = (row_words // 16 * 16)[:, None] + lanes[None, :]  # a multiple of 16, as the compiler has to know
    inputs = token_elements[None, :] + (lanes // 16 * _BLOCK + lanes % 16)[:, None]
    input_mask = token_mask[None, :]
    sums = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    ups = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for block in range(first, first + COUNT, BLOCK):
        for at in tl.static_range(0, BLOCK, 4 * K):
            sums = _step(
                sums, weight, words, scale, row_groups, zero, row_mask, x, inputs, input_mask, block + at,
                GROUP, K, BY_ASSEMBLY,
            )  # fmt: skip
            if GATED:
                ups = _step(
                    ups, up_weight, words, up_scale, row_groups, up_zero, row_mask, x, inputs, input_mask,
                    block + at, GROUP, K, BY_ASSEMBLY,
                )  # fmt: skip
    return sums, ups


@triton.constexpr_function
def _masked(mask: int, magic: int) -> str:
    """(x & mask) | magic, which the compiler makes two instructions of."""
    return f"lop3.b32 $0, $1, {mask}, {magic}, 0xEA;"


@triton.jit
def _pair(pointers, mask, IS_BFLOAT16: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two elements each, in float32, of pointers to two."""
    both = tl.load(pointers, mask=mask, other=0)
    if IS_BFLOAT16:
        first = (both << 16).to(tl.float32, bitcast=True)
        second = (both & -0x10000).to(tl.float32, bitcast=True)
    else:
        first = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def _wide(words, FROM: tl.constexpr, IS_FLOAT: tl.constexpr, BY_ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers at bit FROM of words of 32 bits, in float32.

    Of integers those of odd places plus 16, others plus 256: so two need one shift. e2m1 times 2^-126.
    """
    if IS_FLOAT:
        bits = ((words << (28 - FROM)) >> 6) & -0x7E400000  # the sign fills what lies between; 0x81C00000
    else:
        SHIFT: tl.constexpr = 15 - FROM // 8 * 8
        MASK: tl.constexpr = 0x00780000 if FROM % 8 else 0x00078000
        MAGIC: tl.constexpr = 0x41800000 if FROM % 8 else 0x43800000
        bits = words << SHIFT if SHIFT >= 0 else words >> -SHIFT
        if BY_ASSEMBLY:
            CODE: tl.constexpr = _masked(MASK, MAGIC)
            bits = tl.inline_asm_elementwise(CODE, "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1)
        else:
            bits = (bits & MASK) | MAGIC
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def by_halves(sums, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of ``row_sums`` of rows of two weights in turn, the products with each: two of [ROWS]."""
    return tl.split(tl.reshape(tl.sum(sums, axis=1), (ROWS, 2)))


@triton.jit
def row_sums(  # type: ignore[no-untyped-def]
    weight,
    row_words,
    scale,
    row_groups,
    zero,
    row_zeros,
    row_mask,
    x,
    norm,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
    BY_ASSEMBLY: tl.constexpr,
):
    """Products of ROWS rows with one token, in float32 registers.

    Args:
        weight: in words of 32 bits.
        row_words: [ROWS], where in weight a row begins.
        scale: of groups of GROUP elements.
        row_groups: [ROWS], where in scale a row begins.
        zero: zero points, or None.
        row_zeros: [ROWS], where in zero a row begins.
        row_mask: [ROWS].
        x: the token, two elements in 32 bits.
        norm: likewise what it is multiplied by first, or None.
        DEPTH: elements of a row, a multiple of 64.
        ROWS: of a program.
        BLOCK: elements that are read at once, 64 times a power of two.
        GROUP: 32, or a multiple of 64.
        IS_BFLOAT16: x is, else float16.
        BY_ASSEMBLY: for NVIDIA's GPUs.

    Returns:
        float32 [ROWS, BLOCK / 64], whose sums over the last dimension are the products; and the sum of the
        squares of x if there is a norm.
    """
    IS_FLOAT: tl.constexpr = scale.dtype.element_ty == tl.uint8
    PLACES: tl.constexpr = 2 if GROUP < _BLOCK else 4
    COUNT: tl.constexpr = BLOCK // _BLOCK
    PAIRS: tl.constexpr = BLOCK // 8
    blocks, lanes = tl.arange(0, COUNT), tl.arange(0, PAIRS)
    weights = weight + (row_words // 8 * 8)[:, None]  # a multiple of 8, as the compiler has to know
    inputs = lanes // 8 * (_BLOCK // 2) + lanes % 8
    sums = tl.zeros((ROWS, COUNT), dtype=tl.float32)
    squares = tl.zeros((PAIRS,), dtype=tl.float32)
    later = tl.load(
        weights + lanes[None, :],
        mask=row_mask[:, None] & (lanes < DEPTH // 8)[None, :],
        other=0,
        eviction_policy="evict_first",
    )
    for start in range(0, DEPTH, BLOCK):
        lane_mask = start // 8 + lanes < DEPTH // 8
        block_mask = row_mask[:, None] & (start + blocks * _BLOCK < DEPTH)[None, :]
        w = later
        if DEPTH > BLOCK:  # the next turn's words are asked for before they are used
            next_lanes = (start + BLOCK) // 8 + lanes
            mask = row_mask[:, None] & (next_lanes < DEPTH // 8)[None, :]
            places = weights + next_lanes[None, :]
            later = tl.load(places, mask=mask, other=0, eviction_policy="evict_first")
        for first in tl.static_range(0, 4, PLACES):
            part = tl.zeros((ROWS, PAIRS), dtype=tl.float32)
            offsets = tl.zeros((PAIRS,), dtype=tl.float32)
            total = tl.zeros((PAIRS,), dtype=tl.float32)
            for place in tl.static_range(first, first + PLACES):
                even, odd = _pair(x + (start // 2 + 8 * place + inputs), lane_mask, IS_BFLOAT16)
                if norm is not None:
                    squares += even * even + odd * odd
                    factor, other = _pair(norm + (start // 2 + 8 * place + inputs), lane_mask, IS_BFLOAT16)
                    even *= factor
                    odd *= other
                if IS_FLOAT:
                    even *= _UP
                    odd *= _UP
                else:
                    offsets += (16 if place % 2 else 256) * (even + odd)
                    total += even + odd
                part += _wide(w, 4 * place, IS_FLOAT, BY_ASSEMBLY) * even[None, :]
                part += _wide(w, 16 + 4 * place, IS_FLOAT, BY_ASSEMBLY) * odd[None, :]
            groups = ((start + 16 * first + blocks * _BLOCK) // GROUP)[None, :]
            found = tl.sum(tl.reshape(part, (ROWS, COUNT, 8)), axis=2)
            if IS_FLOAT:
                found *= _DOWN
            else:
                if zero is None:
                    offsets += _ZERO_POINT * total
                found -= tl.sum(tl.reshape(offsets, (COUNT, 8)), axis=1)[None, :]
                if zero is not None:
                    zeros = tl.load(zero + row_zeros[:, None] + groups, mask=block_mask, other=0).to(
                        tl.float32
                    )
                    found -= zeros * tl.sum(tl.reshape(total, (COUNT, 8)), axis=1)[None, :]
            sums += found * scales_of(scale, row_groups[:, None] + groups, block_mask)
    return sums, tl.sum(squares, axis=0)
