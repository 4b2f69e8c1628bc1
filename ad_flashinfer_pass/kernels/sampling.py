"""The end of a step on the device: a token for each row of logits, and the metadata of the next step.

Every row is shared out in parts, one a program, so that even a single row keeps the device busy. A launch
reads what those before it left of all parts, and leaves something of its own:

1. ``_look``: the most likely token of each part.
2. ``_count``, several times for top-k, then for top-p: the lowest score that a filter leaves is found as a
   number, four bits a reading, from what lies below each of the 15 borders between its next digits:
   how many scores for top-k, which mass for top-p.
3. ``_weigh``: the mass that is left of each part.
4. ``_choose``, one program a row: the part in which the cumulative mass passes the row's uniform number, and
   the token there, as ``runtime.sampling`` draws; then the metadata.

A row that takes its most likely token leaves the launches between the first and the last at once; a step of
such rows alone does without them. No sum depends on the order in which programs run: equal inputs give equal
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

_PART = 4096
"""Scores of a part, at most."""
_DIGIT_BITS, _DIGITS = 4, tl.constexpr(16)
# Bits of a number in float32, from the sign on, that can differ from zero.
_SIGNIFICANT_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}


def sample_and_advance(
    scores: Tensor,
    tokens: Tensor,
    views: Mapping[str, Tensor],
    *,
    idle: int,
    advances: bool,
    is_greedy: bool = False,
) -> None:
    """See ``SequenceInfo.sample_and_advance``.

    Args:
        scores: floating [n, vocab_size].
        tokens: int64 [n or more], written.
        views: the metadata by name; those of the first n rows are written.
        idle: written in place of the token of a sequence that had stopped.
        advances: whether the rows are those of a decode step, whose metadata become those of the next.
        is_greedy: no row draws.
    """
    num_rows, vocab_size = scores.shape
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    part = min(_PART, triton.next_power_of_2(vocab_size))
    num_parts, steps = triton.cdiv(vocab_size, part), _SIGNIFICANT_BITS[scores.dtype] // _DIGIT_BITS
    sizes = {"PART": part, "PARTS": triton.next_power_of_2(num_parts)}
    grid = (num_rows, num_parts)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=scores.device)

    best, places = empty(*grid), empty(*grid, dtype=torch.int32)
    sums, borders = empty(2, steps, *grid, _DIGITS.value), empty(2, steps, num_rows, dtype=torch.int64)
    masses, lowest = empty(*grid, dtype=torch.float64), empty(num_rows, dtype=torch.int64)
    filters = (views["temperature"], views["top_k"], views["tail_mass"], views["is_stopped"])
    row = (scores, scores.stride(0), vocab_size, best)
    _look[grid](*row, places, PART=part)
    if not is_greedy:
        for by_mass in (False, True):
            for step in range(steps):
                _count[grid](*row, *filters, sums, borders, step, STEPS=steps, BY_MASS=by_mass, **sizes)
        _weigh[grid](*row, *filters, views["min_p"], sums, borders, masses, lowest, STEPS=steps, **sizes)
    _choose[(num_rows,)](
        *row,
        *filters,
        views["min_p"],
        places,
        masses,
        lowest,
        tokens,
        views["seed"],
        views["num_generated"],
        views["stop_token_ids"],
        views["input_ids"],
        views["position_ids"],
        views["sequence_lengths"],
        views["input_pos"],
        views["seq_len_with_cache"],
        views["cu_num_pages"],
        views["cache_loc"],
        num_parts,
        IDLE=idle,
        DRAWS=not is_greedy,
        ADVANCES=advances,
        NUM_STOPS=views["stop_token_ids"].shape[1],
        **sizes,
    )


@triton.jit
def _look(  # type: ignore[no-untyped-def]
    scores, row_stride, vocab_size, best, places, PART: tl.constexpr
):
    """The first largest score of a part, +inf if one is NaN, and its place."""
    row, part = tl.program_id(0), tl.program_id(1)
    index = part * PART + tl.arange(0, PART)
    score = _scores(scores, row, row_stride, index, vocab_size)
    score = tl.where(score != score, float("inf"), score)
    largest = tl.max(score, 0)
    spot = row * tl.num_programs(1) + part
    tl.store(best + spot, largest)
    tl.store(places + spot, tl.min(tl.where(score == largest, index, vocab_size), 0))


@triton.jit(do_not_specialize=["step"])
def _count(  # type: ignore[no-untyped-def]
    scores,
    row_stride,
    vocab_size,
    best,
    temperature,
    top_k,
    tail_mass,
    is_stopped,
    sums,
    borders,
    step,
    STEPS: tl.constexpr,
    BY_MASS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """What of a part lies below each border of a reading; in place of the lowest border, all of it.

    ``borders`` keeps where the reading begins; ``sums`` what it finds. By rank every score counts alike. By
    mass those count that top-k left.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    heat, k, tail = tl.load(temperature + row), tl.load(top_k + row), tl.load(tail_mass + row)
    has_rank = (k > 0) & (k < vocab_size)
    is_asked = has_rank
    if BY_MASS:
        is_asked = tail >= 0
    if (heat <= 0) | (tl.load(is_stopped + row) > 0) | (is_asked == 0):
        return
    index = part * PART + tl.arange(0, PART)
    score = _scores(scores, row, row_stride, index, vocab_size)
    key = _key(score)
    border = tl.zeros((), tl.uint32)
    if BY_MASS:
        largest = _largest(best, row, PARTS)
        weight = tl.exp((score - largest) / heat)
        if has_rank:
            lowest = _found(sums, borders, row, STEPS, (vocab_size - k).to(tl.float32), False, STEPS, PARTS)
            weight = tl.where(key >= lowest, weight, 0.0)
        if step > 0:
            border = _found(sums, borders, row, step, tail, True, STEPS, PARTS)
    else:
        weight = (index < vocab_size).to(tl.float32)
        if step > 0:
            border = _found(sums, borders, row, step, (vocab_size - k).to(tl.float32), False, STEPS, PARTS)
    place = _place(step, row, BY_MASS, STEPS)
    if part == 0:
        tl.store(borders + place, border.to(tl.int64))
    target = sums + (place * tl.num_programs(1) + part) * _DIGITS
    unit = _unit(step)
    tl.store(target, tl.sum(weight, 0))
    for digit in tl.static_range(1, _DIGITS):
        tl.store(target + digit, tl.sum(tl.where(key < border + digit * unit, weight, 0.0), 0))


@triton.jit
def _found(sums, borders, row, step, limit, BY_MASS: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest key, as far as the readings before ``step`` tell, below which lies no more than the limit.

    The limit is a number of scores, or a part of the whole mass.
    """
    num_parts = tl.num_programs(1)
    place = _place(step - 1, row, BY_MASS, STEPS)
    parts, digits = tl.arange(0, PARTS), tl.arange(0, _DIGITS)
    found = tl.load(
        sums + (place * num_parts + parts[:, None]) * _DIGITS + digits[None, :],
        mask=(parts < num_parts)[:, None] & (digits >= 0)[None, :],
        other=0.0,
    )
    below = tl.sum(found, 0)
    if BY_MASS:
        limit = limit * tl.sum(tl.where(digits == 0, below, 0.0), 0)
    digit = tl.sum(((digits > 0) & (below <= limit)).to(tl.int32), 0)
    return tl.load(borders + place).to(tl.uint32) + digit.to(tl.uint32) * _unit(step - 1)


@triton.jit
def _place(step, row, BY_MASS: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Index of a reading of a row, among those by rank and by mass of all rows."""
    first = STEPS if BY_MASS else 0
    return (first + step) * tl.num_programs(0) + row


@triton.jit
def _unit(step):  # type: ignore[no-untyped-def]
    """The distance of the borders of a reading: its digit's place."""
    return (tl.full((), 1, tl.int64) << (28 - 4 * step)).to(tl.uint32)


@triton.jit
def _weigh(  # type: ignore[no-untyped-def]
    scores,
    row_stride,
    vocab_size,
    best,
    temperature,
    top_k,
    tail_mass,
    is_stopped,
    min_p,
    sums,
    borders,
    masses,
    lowest,
    STEPS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The mass of a part that the filters leave, and the lowest key that top-k and top-p do."""
    row, part = tl.program_id(0), tl.program_id(1)
    heat, k, tail = tl.load(temperature + row), tl.load(top_k + row), tl.load(tail_mass + row)
    if (heat <= 0) | (tl.load(is_stopped + row) > 0):
        return
    largest = _largest(best, row, PARTS)
    least = tl.zeros((), tl.uint32)
    if (k > 0) & (k < vocab_size):
        least = _found(sums, borders, row, STEPS, (vocab_size - k).to(tl.float32), False, STEPS, PARTS)
    if tail >= 0:
        border = _found(sums, borders, row, STEPS, tail, True, STEPS, PARTS)
        least = tl.maximum(least, tl.minimum(border, _key(largest)))
    index = part * PART + tl.arange(0, PART)
    mass = _mass(scores, row, row_stride, index, vocab_size, largest, heat, least, tl.load(min_p + row))
    tl.store(masses + row * tl.num_programs(1) + part, tl.sum(mass, 0))
    if part == 0:
        tl.store(lowest + row, least.to(tl.int64))


@triton.jit(do_not_specialize=["num_parts"])
def _choose(  # type: ignore[no-untyped-def]
    scores,
    row_stride,
    vocab_size,
    best,
    temperature,
    top_k,
    tail_mass,
    is_stopped,
    min_p,
    places,
    masses,
    lowest,
    tokens,
    seed,
    num_generated,
    stop_token_ids,
    input_ids,
    position_ids,
    sequence_lengths,
    input_pos,
    seq_len_with_cache,
    cu_num_pages,
    cache_loc,
    num_parts,
    IDLE: tl.constexpr,
    DRAWS: tl.constexpr,
    ADVANCES: tl.constexpr,
    NUM_STOPS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The token of one row, and its metadata."""
    row = tl.program_id(0)
    parts = tl.arange(0, PARTS)
    is_part = parts < num_parts
    scores_of_parts = tl.load(best + row * num_parts + parts, mask=is_part, other=-float("inf"))
    largest = tl.max(scores_of_parts, 0)
    firsts = tl.load(places + row * num_parts + parts, mask=is_part, other=vocab_size)
    token = tl.min(tl.where(scores_of_parts == largest, firsts, vocab_size), 0)
    token = tl.where(tl.abs(largest) == float("inf"), -1, token)

    is_idle = tl.load(is_stopped + row) > 0
    if DRAWS:
        heat = tl.load(temperature + row)
        if (heat > 0) & (token >= 0) & (is_idle == 0):
            of_parts = tl.load(masses + row * num_parts + parts, mask=is_part, other=0.0)
            passed = tl.cumsum(of_parts, 0)
            target = _uniform(tl.load(seed + row), tl.load(num_generated + row)) * tl.max(passed, 0)
            part = tl.min(tl.where(passed > target, parts, num_parts - 1), 0)
            before = tl.sum(tl.where(parts == part, passed - of_parts, 0.0), 0)
            index = part * PART + tl.arange(0, PART)
            least = tl.load(lowest + row).to(tl.uint32)
            mass = _mass(
                scores, row, row_stride, index, vocab_size, largest, heat, least, tl.load(min_p + row)
            )
            is_beyond = (before + tl.cumsum(mass, 0) > target) & (mass > 0)
            found = tl.min(tl.where(is_beyond, index, vocab_size), 0)
            # Both sums of the part are rounded, each in its order: none may be beyond. Then it is the last.
            last = tl.max(tl.where(mass > 0, index, token), 0)
            token = tl.where(found < vocab_size, found, last)
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
        tl.store(sequence_lengths + row, (position + 1).to(tl.int64))
        tl.store(seq_len_with_cache + row, position + 1)
        first_page = cache_loc + tl.load(cu_num_pages + row)
        tl.store(first_page, tl.load(first_page) * goes_on, mask=stop)


@triton.jit
def _scores(scores, row, row_stride, index, vocab_size):  # type: ignore[no-untyped-def]
    source = scores + row.to(tl.int64) * row_stride
    return tl.load(source + index, mask=index < vocab_size, other=-float("inf")).to(tl.float32)


@triton.jit
def _largest(best, row, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the scores of a row."""
    num_parts, parts = tl.num_programs(1), tl.arange(0, PARTS)
    return tl.max(tl.load(best + row * num_parts + parts, mask=parts < num_parts, other=-float("inf")), 0)


@triton.jit
def _key(score):  # type: ignore[no-untyped-def]
    """uint32 in the order of float32 numbers; both zeros alike."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.to(tl.uint32, bitcast=True) ^ tl.full((), 0x80000000, tl.uint32)


@triton.jit
def _mass(scores, row, row_stride, index, vocab_size, largest, heat, lowest, min_p):  # type: ignore[no-untyped-def]
    """float64, relative to the most likely token's; 0 for what the filters drop."""
    score = _scores(scores, row, row_stride, index, vocab_size)
    exponent = (score - largest) / heat
    floor = tl.where(min_p > 0, tl.log(tl.maximum(min_p, 1e-38)), -float("inf"))
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
