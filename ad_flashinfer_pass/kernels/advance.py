"""The end of a step as one Triton kernel: a token for each row of logits, and the metadata of the next step.

A program takes one row. It reads the row once for the most likely token. If the sequence samples, it finds
the lowest score that the filters leave, as a number built bit by bit, two bits a reading: for top-k from
counts of the scores above it, for top-p from the mass below it. Then it draws as ``runtime.sampling`` does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
# Bits of a number in float32, from the sign on, that can differ from zero.
_SIGNIFICANT_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}


def sample_and_advance(
    scores: Tensor, tokens: Tensor, views: Mapping[str, Tensor], *, idle: int, advances: bool
) -> None:
    """See ``SequenceInfo.sample_and_advance``.

    Args:
        scores: floating [n, vocab_size].
        tokens: int64 [n or more], written.
        views: the metadata by name; those of the first n rows are written.
        idle: written in place of the token of a sequence that had stopped.
        advances: whether the rows are those of a decode step, whose metadata become those of the next.
    """
    num_rows, vocab_size = scores.shape
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    _sample[(num_rows,)](
        scores,
        scores.stride(0),
        vocab_size,
        tokens,
        views["temperature"],
        views["top_k"],
        views["tail_mass"],
        views["min_p"],
        views["seed"],
        views["num_generated"],
        views["is_stopped"],
        views["stop_token_ids"],
        views["input_ids"],
        views["position_ids"],
        views["input_pos"],
        views["seq_len_with_cache"],
        views["cu_num_pages"],
        views["cache_loc"],
        IDLE=idle,
        ADVANCES=advances,
        NUM_STOPS=views["stop_token_ids"].shape[1],
        BITS=_SIGNIFICANT_BITS[scores.dtype],
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab_size)),
        num_warps=16,
    )


@triton.jit
def _sample(  # type: ignore[no-untyped-def]
    scores,
    row_stride,
    vocab_size,
    tokens,
    temperature,
    top_k,
    tail_mass,
    min_p,
    seed,
    num_generated,
    is_stopped,
    stop_token_ids,
    input_ids,
    position_ids,
    input_pos,
    seq_len_with_cache,
    cu_num_pages,
    cache_loc,
    IDLE: tl.constexpr,
    ADVANCES: tl.constexpr,
    NUM_STOPS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0)
    source = scores + row.to(tl.int64) * row_stride
    token, largest = _most_likely(source, vocab_size, BLOCK)
    heat = tl.load(temperature + row)
    is_idle = tl.load(is_stopped + row) > 0
    if (heat > 0) & (token >= 0) & (is_idle == 0):
        lowest = tl.zeros((), tl.uint32)
        k = tl.load(top_k + row)
        if (k > 0) & (k < vocab_size):
            lowest = _of_rank(source, vocab_size, k, BITS, BLOCK)
        tail = tl.load(tail_mass + row)
        if tail >= 0:
            lowest = _above_tail(source, vocab_size, largest, heat, lowest, tail, BITS, BLOCK)
        least = tl.load(min_p + row)
        floor = tl.where(least > 0, tl.log(tl.maximum(least, 1e-38)), -float("inf"))
        number = _uniform(tl.load(seed + row), tl.load(num_generated + row))
        token = _drawn(source, vocab_size, largest, heat, lowest, floor, number, token, BLOCK)
    tl.store(num_generated + row, tl.load(num_generated + row) + 1)

    token = tl.where(is_idle, IDLE, token.to(tl.int64))
    tl.store(tokens + row, token)
    if ADVANCES:
        stops = tl.load(stop_token_ids + row * NUM_STOPS + tl.arange(0, NUM_STOPS))
        stop = (tl.max((stops == token).to(tl.int32), 0) > 0) | (token < 0)
        goes_on = tl.where(stop, 0, 1)
        tl.store(is_stopped + row, 1 - goes_on)
        tl.store(input_ids + row, token * goes_on)
        position = (tl.load(input_pos + row) + 1) * goes_on
        tl.store(input_pos + row, position)
        tl.store(position_ids + row, position.to(tl.int64))
        tl.store(seq_len_with_cache + row, position + 1)
        first_page = cache_loc + tl.load(cu_num_pages + row)
        tl.store(first_page, tl.load(first_page) * goes_on, mask=stop)


@triton.jit
def _most_likely(source, vocab_size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first largest score's place, -1 if it is not finite, and that score."""
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    has_nan = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab_size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        score = tl.load(source + index, mask=index < vocab_size, other=-float("inf")).to(tl.float32)
        has_nan |= (score != score).to(tl.int32)
        is_better = score > best
        best = tl.where(is_better, score, best)
        place = tl.where(is_better, index, place)
    largest = tl.max(best, 0)
    first = tl.min(tl.where(best == largest, place, vocab_size), 0)
    is_bad = (tl.max(has_nan, 0) > 0) | (tl.abs(largest) == float("inf"))
    return tl.where(is_bad, -1, first), largest


@triton.jit
def _key(score):  # type: ignore[no-untyped-def]
    """uint32 in the order of float32 numbers; both zeros alike."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.to(tl.uint32, bitcast=True) ^ tl.full((), 0x80000000, tl.uint32)


@triton.jit
def _of_rank(source, vocab_size, k, BITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest key that k scores reach: that of the k-th largest score."""
    lowest = tl.zeros((), tl.uint32)
    for step in range(BITS // 2):
        unit = (tl.full((), 1, tl.int64) << (30 - 2 * step)).to(tl.uint32)
        one = tl.zeros((BLOCK,), tl.int32)
        two = tl.zeros((BLOCK,), tl.int32)
        three = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, vocab_size, BLOCK):
            index = start + tl.arange(0, BLOCK)
            is_token = index < vocab_size
            key = _key(tl.load(source + index, mask=is_token, other=-float("inf")).to(tl.float32))
            one += (is_token & (key >= lowest + unit)).to(tl.int32)
            two += (is_token & (key >= lowest + 2 * unit)).to(tl.int32)
            three += (is_token & (key >= lowest + 3 * unit)).to(tl.int32)
        reached = (tl.sum(one, 0) >= k).to(tl.uint32) + (tl.sum(two, 0) >= k).to(tl.uint32)
        lowest += (reached + (tl.sum(three, 0) >= k).to(tl.uint32)) * unit
    return lowest


@triton.jit
def _above_tail(  # type: ignore[no-untyped-def]
    source, vocab_size, largest, heat, lowest, tail, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key, at most the largest score's, below which lies no more than this part of the mass.

    Only keys from ``lowest`` on have mass.
    """
    whole = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        score = tl.load(source + index, mask=index < vocab_size, other=-float("inf")).to(tl.float32)
        whole += tl.where(_key(score) >= lowest, tl.exp((score - largest) / heat), 0.0)
    limit = tail * tl.sum(whole, 0)
    border = tl.zeros((), tl.uint32)
    for step in range(BITS // 2):
        unit = (tl.full((), 1, tl.int64) << (30 - 2 * step)).to(tl.uint32)
        one = tl.zeros((BLOCK,), tl.float32)
        two = tl.zeros((BLOCK,), tl.float32)
        three = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            index = start + tl.arange(0, BLOCK)
            score = tl.load(source + index, mask=index < vocab_size, other=-float("inf")).to(tl.float32)
            key = _key(score)
            mass = tl.where(key >= lowest, tl.exp((score - largest) / heat), 0.0)
            one += tl.where(key < border + unit, mass, 0.0)
            two += tl.where(key < border + 2 * unit, mass, 0.0)
            three += tl.where(key < border + 3 * unit, mass, 0.0)
        passed = (tl.sum(one, 0) <= limit).to(tl.uint32) + (tl.sum(two, 0) <= limit).to(tl.uint32)
        border += (passed + (tl.sum(three, 0) <= limit).to(tl.uint32)) * unit
    return tl.maximum(lowest, tl.minimum(border, _key(largest)))


@triton.jit
def _drawn(  # type: ignore[no-untyped-def]
    source, vocab_size, largest, heat, lowest, floor, number, otherwise, BLOCK: tl.constexpr
):
    """Where the cumulative mass of what is left passes ``number`` of the whole."""
    whole = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, vocab_size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        whole += _mass(source, index, vocab_size, largest, heat, lowest, floor)
    target = number * tl.sum(whole, 0)
    passed = tl.zeros((), tl.float64)
    found = vocab_size + tl.zeros((), tl.int32)
    for start in range(0, vocab_size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mass = _mass(source, index, vocab_size, largest, heat, lowest, floor)
        here = tl.sum(mass, 0)
        if (passed <= target) & (passed + here > target):
            is_beyond = (passed + tl.cumsum(mass, 0) > target) & (mass > 0)
            found = tl.minimum(found, tl.min(tl.where(is_beyond, index, vocab_size), 0))
        passed += here
    return tl.where(found < vocab_size, found, otherwise)


@triton.jit
def _mass(source, index, vocab_size, largest, heat, lowest, floor):  # type: ignore[no-untyped-def]
    score = tl.load(source + index, mask=index < vocab_size, other=-float("inf")).to(tl.float32)
    exponent = (score - largest) / heat
    is_left = (_key(score) >= lowest) & (exponent >= floor) & (index < vocab_size)
    return tl.where(is_left, tl.exp(exponent), 0.0).to(tl.float64)


@triton.jit
def _uniform(seed, index):  # type: ignore[no-untyped-def]
    """``runtime.sampling.uniforms`` of one seed and index."""
    gamma = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    state = _mixed(seed.to(tl.uint64) + gamma)
    mixed = _mixed(state + (index + 1).to(tl.uint64) * gamma)
    return ((mixed >> 16) & 0xFFFFFFFFFFFF).to(tl.int64).to(tl.float64) / 281474976710656.0


@triton.jit
def _mixed(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)
