"""Sets of (query, key, size), and linear forms that are bounded over them.

The arithmetic of the mask prover. A ``Form`` stands for a number that depends on where in the mask one
looks: a linear part, a remainder of which only bounds are known, and a relative error. ``Cells`` are many
regions of the mask at once, one array entry a region. Bounds are sound: at any point of a cell the true
value of a form lies within ``Cells.limits`` of it. They are float64, which holds the integers of a mask
exactly.

Variables: ``q`` and ``k``, the indices of query and key; ``s``, the number of tokens; ``b``, the batch
row, and ``rows``, their number; ``p``, the position at which the row starts; ``j0``, ``j1``, ...: the
running index of a sum.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Array: TypeAlias = npt.NDArray[Any]
Limits: TypeAlias = tuple[Array, Array]

QUERY, KEY, LAG, SIZE = range(4)
"""Axes of a cell; the lag is query - key."""
_AXIS = {"q": QUERY, "k": KEY, "s": SIZE}

_EXACT = 2.0**53
NOTHING, UNIT = np.zeros(1), np.ones(1)
_BITS = {torch.float64: 53, torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to a float format."""
    return 2.0 ** -_BITS[dtype]


@dataclass(frozen=True, eq=False)
class Form:
    """``(sum(terms[v] * v) + r) * (1 + e)`` with lo <= r <= hi and abs(e) <= error.

    Arrays have one entry a cell, or one for all.
    """

    lo: Array
    hi: Array
    terms: Mapping[str, Array] = field(default_factory=dict)
    grain: Array = field(default_factory=lambda: NOTHING)
    """Every value is a multiple of this power of two; 0 if nothing is known. It tells when a float
    format holds the value exactly."""
    error: Array = field(default_factory=lambda: NOTHING)
    floor_of: tuple[Form, float] | None = None
    """(x, c) if the form is floor(x / c) of an integer x."""

    def __add__(self, other: Form) -> Form:
        if self.has_error or other.has_error:
            raise AssertionError("Cells.plus adds forms with errors")
        terms = dict(self.terms)
        for var, factor in other.terms.items():
            terms[var] = terms[var] + factor if var in terms else factor
            if not some(terms[var]):
                del terms[var]
        return Form(
            *_plus((self.lo, self.hi), (other.lo, other.hi)), terms, np.minimum(self.grain, other.grain)
        )

    def __neg__(self) -> Form:
        terms = {var: -factor for var, factor in self.terms.items()}
        return Form(-self.hi, -self.lo, terms, self.grain, self.error)

    def __sub__(self, other: Form) -> Form:
        return self + -other

    def scaled(self, factor: Array) -> Form:
        """The form times a number that is known in every cell."""
        terms = {var: value * factor for var, value in self.terms.items()} if some(factor) else {}
        grain = multiplied(self.grain, grain_of(factor))
        return Form(*span(factor, self.lo, self.hi), terms, grain, self.error)

    @property
    def has_error(self) -> bool:
        """Whether there is a relative error in any cell."""
        return self.error is not NOTHING and some(self.error)

    @property
    def exact(self) -> Form:
        """The form without its relative error."""
        return replace(self, error=NOTHING)

    @property
    def is_integer(self) -> bool:
        """Whether it is an integer in every cell."""
        return not some(self.grain < 1)

    @property
    def is_known(self) -> bool:
        """Whether it is one number in every cell."""
        return not self.terms and not self.has_error and bool((self.lo == self.hi).all())


def some(values: Array) -> bool:
    """Whether any is not 0; several times faster on small arrays than ``any``."""
    return bool(np.count_nonzero(values))


def _no_nan(lo: Array, hi: Array) -> Limits:
    """An undefined bound says nothing."""
    if not (some(np.isnan(lo)) or some(np.isnan(hi))):
        return lo, hi
    return np.where(np.isnan(lo), -np.inf, lo), np.where(np.isnan(hi), np.inf, hi)


def number(value: float | Array) -> Form:
    """A form that is one known number in every cell."""
    if isinstance(value, np.ndarray):
        array = np.atleast_1d(value.astype(np.float64))
        return Form(*_no_nan(array, array), {}, grain_of(array))
    return _constant(float(value))


@functools.cache
def _constant(value: float) -> Form:
    array = np.array([value])
    return Form(*_no_nan(array, array), {}, grain_of(array))


def variable(name: str) -> Form:
    """One variable."""
    return Form(NOTHING, NOTHING, {name: UNIT}, UNIT)


def between(lo: Array, hi: Array, grain: Array = NOTHING) -> Form:
    """A number of which only bounds are known."""
    lo, hi = _no_nan(np.asarray(lo, dtype=np.float64), np.asarray(hi, dtype=np.float64))
    return Form(lo, hi, {}, grain)


UNKNOWN = between(np.array([-np.inf]), np.array([np.inf]))
"""Any number, or none."""


def pick(choice: Array, yes: Form, no: Form) -> Form:
    """``yes`` in the cells where ``choice`` holds and ``no`` in the others."""
    names = {*yes.terms, *no.terms}
    terms = {var: np.where(choice, yes.terms.get(var, 0.0), no.terms.get(var, 0.0)) for var in names}
    lo, hi = np.where(choice, yes.lo, no.lo), np.where(choice, yes.hi, no.hi)
    error = np.where(choice, yes.error, no.error) if yes.has_error or no.has_error else NOTHING
    return Form(lo, hi, terms, np.where(choice, yes.grain, no.grain), error)


def span(factor: Array, lo: Array, hi: Array) -> Limits:
    """Bounds of factor * x for lo <= x <= hi."""
    a, b = factor * lo, factor * hi
    return _no_nan(np.minimum(a, b), np.maximum(a, b))


def grain_of(values: Array) -> Array:
    """The largest power of two that divides each number; inf for 0, and 0 for infinite ones."""
    mantissa, exponent = np.frexp(np.where(np.isfinite(values), values, 0.0))
    digits = (mantissa * _EXACT).astype(np.int64)
    grain = np.ldexp((digits & -digits).astype(np.float64), exponent - 53)
    return np.where(values == 0, np.inf, grain)


def multiplied(a: Array, b: Array) -> Array:
    """The grain of a product."""
    return np.where((a > 0) & (b > 0), a * b, 0.0)


class Cells:
    """Regions of the mask: bounds on query, key, query - key and size, and one head each.

    Only points with query < size and key < size belong to a region.
    """

    def __init__(self, lo: Array, hi: Array, head: Array, other: Mapping[str, Limits]) -> None:
        """``lo`` and ``hi``: int64 [4, num_cells]; ``other``: bounds of the remaining variables."""
        self.lo, self.hi, self.head, self.other = lo, hi, head, dict(other)

    def __len__(self) -> int:
        return len(self.head)

    def take(self, which: Array) -> Cells:
        """Some of the cells, by index or by truth value."""
        return Cells(self.lo[:, which], self.hi[:, which], self.head[which], self.other)

    def split(self, axis: Array, at: Array) -> Cells:
        """Each cell in two: below ``at`` on its axis, and from ``at`` on."""
        everywhere = np.arange(len(self))
        below, above = self.hi.copy(), self.lo.copy()
        below[axis, everywhere] = at - 1
        above[axis, everywhere] = at
        lo = np.concatenate((self.lo, above), axis=1)
        hi = np.concatenate((below, self.hi), axis=1)
        return Cells(lo, hi, np.concatenate((self.head, self.head)), self.other).tightened()

    def batches(self, size: int) -> list[Cells]:
        """The cells in reading order, some at a time."""
        query, key, tokens = self.first()
        order = np.lexsort((tokens, key, query))
        return [self.take(order[at : at + size]) for at in range(0, len(self), size)]

    def tightened(self) -> Cells:
        """The same points in the narrowest bounds; cells without points are left out."""
        (ql, kl, dl, sl), (qh, kh, dh, sh) = self.lo, self.hi
        for _ in range(2):  # difference constraints over three variables are closed after two rounds
            qh, kh = np.minimum(qh, sh - 1), np.minimum(kh, sh - 1)
            ql, qh = np.maximum(ql, kl + dl), np.minimum(qh, kh + dh)
            kl, kh = np.maximum(kl, ql - dh), np.minimum(kh, qh - dl)
            dl, dh = np.maximum(dl, ql - kh), np.minimum(dh, qh - kl)
            sl = np.maximum(sl, np.maximum(ql, kl) + 1)
        kept = (ql <= qh) & (kl <= kh) & (dl <= dh) & (sl <= sh)
        return Cells(np.stack((ql, kl, dl, sl)), np.stack((qh, kh, dh, sh)), self.head, self.other).take(kept)

    def first(self) -> tuple[Array, Array, Array]:
        """Query, key and size of the first point of each cell, in reading order."""
        query = self.lo[QUERY]
        key = np.maximum(self.lo[KEY], query - self.hi[LAG])
        return query, key, np.maximum(self.lo[SIZE], np.maximum(query, key) + 1)

    def starts_before(self, order: tuple[int, int, int]) -> Array:
        """Which cells have points before a (query, key, size), in reading order."""
        query, key, size = self.first()
        before = np.zeros(len(self), dtype=bool)
        for own, other in reversed(list(zip((query, key, size), order, strict=True))):
            before = (own < other) | ((own == other) & before)
        return before

    def limits(self, form: Form) -> Limits:
        """Bounds of a form over each cell."""
        lo, hi = form.lo, form.hi
        axes = {var: factor for var, factor in form.terms.items() if var in _AXIS}
        for var, factor in form.terms.items():
            if var not in axes:
                lo, hi = _plus((lo, hi), span(factor, *self.other[var]))
        if axes:
            lo, hi = _plus((lo, hi), self._limits_of_axes(axes))
        if form.has_error:
            lo, hi = _no_nan(lo - _share(form.error, lo), hi + _share(form.error, hi))
        return lo, hi

    def _limits_of_axes(self, terms: Mapping[str, Array]) -> Limits:
        """Each way to write the form is a bound; the tightest of them is taken."""
        q, k, s = (terms.get(var, NOTHING) for var in "qks")
        if "s" not in terms:
            return self._limits_of_qk(q, k)
        ways = [_plus(self._limits_of_qk(q, k), self._span(s, SIZE))]
        for axis, (at_q, at_k) in ((QUERY, (q + s, k)), (KEY, (q, k + s))):
            # s = axis + beyond, with beyond >= 1
            beyond = np.maximum(self.lo[SIZE] - self.hi[axis], 1), self.hi[SIZE] - self.lo[axis]
            ways.append(_plus(self._limits_of_qk(at_q, at_k), span(s, *beyond)))
        return _tightest(ways)

    def _limits_of_qk(self, q: Array, k: Array) -> Limits:
        if not some(k):
            return self._span(q, QUERY)
        if not some(q):
            return self._span(k, KEY)
        return _tightest(
            [
                _plus(self._span(q, QUERY), self._span(k, KEY)),
                _plus(self._span(q + k, QUERY), self._span(-k, LAG)),
                _plus(self._span(q + k, KEY), self._span(q, LAG)),
            ]
        )

    def _span(self, factor: Array, axis: int) -> Limits:
        a, b = factor * self.lo[axis], factor * self.hi[axis]
        return np.minimum(a, b), np.maximum(a, b)

    def plus(self, a: Form, b: Form) -> Form:
        """a + b; relative errors stay so where both have the same sign, and become bounds elsewhere."""
        if not a.has_error and not b.has_error:
            return a + b
        (a_lo, a_hi), (b_lo, b_hi) = self.limits(a), self.limits(b)
        is_same = ((a_lo >= 0) & (b_lo >= 0)) | ((a_hi <= 0) & (b_hi <= 0))
        same = replace(a.exact + b.exact, error=np.maximum(a.error, b.error))
        return pick(is_same, same, self.absolute(a) + self.absolute(b))

    def absolute(self, form: Form) -> Form:
        """The form with its relative error as part of its bounds."""
        if not form.has_error:
            return form
        reach = np.maximum(*(_share(form.error, limit) for limit in self.limits(form.exact)))
        return Form(*_no_nan(form.lo - reach, form.hi + reach), form.terms, form.grain)

    def settled(self, form: Form) -> Form:
        """The form with its value in the cells that leave only one."""
        if not form.terms:
            return form
        lo, hi = self.limits(form)
        single = lo == hi
        return pick(single, Form(lo, hi, {}, form.grain), form) if some(single) else form

    def rounded(self, form: Form, dtype: torch.dtype) -> Form:
        """What is left of a form when it is stored in ``dtype``."""
        lo, hi = self.limits(form)
        largest = np.maximum(np.abs(lo), np.abs(hi))
        if not dtype.is_floating_point:
            info = torch.iinfo(dtype)
            fits = (lo >= info.min) & (hi <= info.max) & (largest < _EXACT)
            return form if fits.all() else pick(fits, form, replace(UNKNOWN, grain=UNIT))
        highest = torch.finfo(dtype).max
        if not some(largest > np.minimum(highest, form.grain / roundoff(dtype))):
            return form
        form = self.settled(form)
        is_linear = np.any([np.broadcast_to(f != 0, largest.shape) for f in form.terms.values()], axis=0)
        lo, hi = (_stored(limit, dtype) for limit in self.limits(replace(form, terms={})))
        # Rounding keeps multiples of the grain: it only happens where the format's own steps are larger.
        known = np.where(lo == hi, grain_of(lo), 0.0)
        stored = Form(lo, hi, {}, np.maximum(form.grain, known))
        if not form.terms:
            return stored
        tiny = torch.finfo(dtype).smallest_normal  # below it, errors are absolute
        error = (1 + form.error) * (1 + roundoff(dtype)) - 1
        stored = pick(is_linear, Form(form.lo - tiny, form.hi + tiny, form.terms, form.grain, error), stored)
        overflows = is_linear & (largest > highest)
        return pick(overflows, UNKNOWN, stored) if some(overflows) else stored


def _share(error: Array, limit: Array) -> Array:
    """The absolute error of a bound; none of an infinite bound that is exact."""
    return np.where(error > 0, error * np.abs(limit), 0.0)


def _stored(values: Array, dtype: torch.dtype) -> Array:
    """Float64 values rounded to a float format."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).double().numpy()


def _plus(a: Limits, b: Limits) -> Limits:
    return _no_nan(a[0] + b[0], a[1] + b[1])


def _tightest(ways: list[Limits]) -> Limits:
    lows, highs = zip(*ways, strict=True)
    return np.maximum.reduce(lows), np.minimum.reduce(highs)
