"""Showing what a mask program computes, for every query, key, head, row and number of tokens at once.

The mask is cut into cells, and each cell is read once (see ``reading``). A cell in which the program
could be visible or hidden is split and read again, until all are decided or there are too many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import fx

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.masks import rules
from ad_flashinfer_pass.masks.forms import Array, Cells, Form, between, number, roundoff, variable
from ad_flashinfer_pass.masks.program import MaskProgram
from ad_flashinfer_pass.masks.reading import Reading, negated, rule_of
from ad_flashinfer_pass.masks.tables import Table

# An additive mask value this far below that of the query itself takes a weight to zero: exp(-9e3) is 0 in
# float32, and no two logits of a model are nearly as far apart. Models use -1e4 (-9984 in bfloat16) and less.
HIDDEN = -9e3
# A bias may depart from its line by this many roundings of its dtype, and by this much near zero.
_ROUNDINGS, _NEARLY_ZERO = 8, 2.0**-20
_LARGEST_BIAS = 2.0**30
_MOST_CELLS, _AT_ONCE = 100_000, 1024
_MOST_ROWS = 2**16

assert rules.__doc__  # importing it registers them

Judge: TypeAlias = Callable[[Reading], tuple[Array, Array]]


@dataclass(frozen=True)
class Point:
    """One place of a mask."""

    head: int
    query: int
    key: int
    size: int
    low: float
    high: float
    """Bounds on the mask's value there, which are equal if it is known."""

    @property
    def order(self) -> tuple[int, int, int]:
        """Reading order."""
        return self.query, self.key, self.size


class Undecided(Exception):
    """The value at a point is not known, or there are too many cells; ``point`` is where."""

    def __init__(self, point: Point, reason: str) -> None:
        self.point, self.reason = point, reason


def readable_program(program: MaskProgram) -> MaskProgram:
    """The program in a form that has no writes in place, and no op that only its parts have rules for."""
    has_rules = all(
        node.op != "call_function" or node in program.constants or rule_of(node) is not None
        for node in program.nodes
    )
    return program if program.is_functional and has_rules else program.functional()


class Rough(Undecided):
    """The bias at a point is a slope times the distance, but rounded to a shorter format than the mask's."""


class Proof:
    """A program over sizes ``low`` to ``high``, in rows that start at positions 0 to ``last_start``."""

    def __init__(self, program: MaskProgram, low: int, high: int, last_start: int = 0) -> None:
        self.program, self.low, self.high = program, low, high
        self.dtype: torch.dtype = g.value(program.mask).dtype
        self.num_heads = program.num_heads
        self.num_cells = 0
        self.slopes: Array = np.zeros(self.num_heads)
        self._other = {
            "p": (np.zeros(1), np.array([float(last_start)])),
            "b": (np.zeros(1), np.array([_MOST_ROWS - 1.0])),
            "rows": (np.ones(1), np.array([float(_MOST_ROWS)])),
        }
        self._tables: dict[fx.Node, Table] = {}
        if self.dtype != torch.bool and high > 1:
            self.slopes = self._find_slopes()

    def cells(
        self,
        query: tuple[int, int] | None = None,
        key: tuple[int, int] | None = None,
        lag: tuple[int, int] | None = None,
        size: tuple[int, int] | None = None,
        heads: int | None = None,
    ) -> Cells:
        """The whole mask, or what the bounds leave of it; one cell a head."""
        last = self.high - 1
        bounds = (query or (0, last), key or (0, last), lag or (-last, last), size or (self.low, self.high))
        heads = heads or self.num_heads
        lo, hi = (np.repeat(np.array([b[side] for b in bounds])[:, None], heads, 1) for side in (0, 1))
        return Cells(lo, hi, np.arange(heads), self._other).tightened()

    @np.errstate(all="ignore")
    def first_no(self, cells: Cells, judge: Judge) -> Point | None:
        """The first point, in reading order, at which the verdict is no; None if it is yes everywhere.

        Raises:
            Undecided: the verdict on some point before that cannot be known, or there are too many cells.
        """
        first: Point | None = None
        waiting, count = [cells], 0
        while waiting:
            cells = waiting.pop()
            if not len(cells):
                continue
            count += len(cells)
            if count > _MOST_CELLS:
                raise Undecided(self._point(cells), f"the mask is too irregular ({count} regions)")
            reading = Reading(self.program, self._tables, cells)
            yes, no = (np.broadcast_to(verdict, len(cells)) for verdict in judge(reading))
            if no.any():
                found = self._point(cells.take(no))
                first = found if first is None else min(first, found, key=lambda point: point.order)
            is_open = ~(yes | no)
            if first is not None:
                is_open &= cells.starts_before(first.order)
                waiting = [rest.take(rest.starts_before(first.order)) for rest in waiting]
            axis, at = reading.split()
            if np.any(is_open & (axis < 0)):
                point = self._point(cells.take(is_open & (axis < 0)))
                raise Undecided(point, f"its value is only known to lie in [{point.low:g}, {point.high:g}]")
            cells = cells.take(is_open).split(axis[is_open], at[is_open])
            waiting += reversed(cells.batches(_AT_ONCE))
        self.num_cells += count
        return first

    def check(self, form: Callable[[Reading], Form]) -> Point | None:
        """The first point at which the mask is not visible where ``form`` is 1 and hidden where it is 0.

        Raises:
            Undecided: that cannot be known.
        """

        return self.first_no(self.cells(), lambda reading: self._agrees(reading, form))

    @np.errstate(all="ignore")
    def first_departure(self, form: Callable[[Reading], Form], head: int) -> Point | None:
        """The same for the longest row of one head only, key by key, where nothing is rounded twice."""
        keys = np.arange(self.high)
        query, size = np.full_like(keys, self.high - 1), np.full_like(keys, self.high)
        places = np.stack((query, keys, query - keys, size))
        cells = Cells(places, places, np.full_like(keys, head), self._other)
        _, wrong = self._agrees(Reading(self.program, self._tables, cells), form)
        return self._point(cells.take(wrong)) if wrong.any() else None

    def _agrees(self, reading: Reading, form: Callable[[Reading], Form]) -> tuple[Array, Array]:
        visible, hidden, is_rough = self.visibility(reading)
        wanted = form(reading)
        wants, wants_not = wanted.lo >= 1, wanted.hi <= 0
        is_rough = np.broadcast_to(is_rough & wants & (hidden.lo < 1), len(reading.cells))
        if is_rough.any():
            reason = "its bias is a slope times the distance, but rounded to a shorter format than the mask's"
            raise Rough(self._point(reading.cells.take(is_rough)), reason)
        odd = (visible.hi <= 0) & (hidden.hi <= 0)
        right = (wants & (visible.lo >= 1)) | (wants_not & (hidden.lo >= 1))
        wrong = odd | (wants & (visible.hi <= 0)) | (wants_not & (hidden.hi <= 0))
        return right, wrong

    def visibility(self, reading: Reading) -> tuple[Form, Form, Array]:
        """Two truth values, the key is visible with its bias and the key is hidden; and where bias is rough.

        A bias is measured from that of the query itself, because a number that is added to a whole row
        does not change its softmax. Both are false for what is neither, such as -5.
        """
        query, key = variable("q"), variable("k")
        value = reading.mask(query, key)
        if self.dtype == torch.bool:
            return value, negated(value), np.zeros(1, dtype=bool)
        own = reading.mask(query, query)
        hidden = reading.le(reading.cells.plus(value, -own), number(HIDDEN))
        # Linear parts must be equal; relative errors may come on top of them.
        tolerance = _ROUNDINGS * roundoff(self.dtype)
        slopes, lag = self.slopes[reading.cells.head], query - key
        rest = value.exact - own.exact + lag.scaled(slopes)
        allowed = lag.scaled(tolerance * np.abs(slopes)) + self._rounding(reading.cells, value, tolerance)
        visible = reading.both(reading.le(rest, allowed), reading.le(-rest, allowed))
        is_rough = np.maximum(value.error, own.error) > tolerance
        return between(np.where(is_rough, 0, visible.lo), np.where(is_rough, 1, visible.hi)), hidden, is_rough

    def _rounding(self, cells: Cells, value: Form, tolerance: float) -> Form:
        """By how much a value may be off because it was rounded."""
        lo, hi = cells.limits(value)
        least = np.where((lo <= 0) & (hi >= 0), 0.0, np.minimum(np.abs(lo), np.abs(hi)))
        # An infinite number is not the rounding of any bias.
        least, most = (np.minimum(m, _LARGEST_BIAS) for m in (least, np.maximum(np.abs(lo), np.abs(hi))))
        return between(_NEARLY_ZERO + tolerance * least, _NEARLY_ZERO + tolerance * most)

    def shifts_rows(self) -> bool:
        """Whether the mask adds anything to a query's own logit."""
        if self.dtype == torch.bool:
            return False
        cells = self.cells(lag=(0, 0))
        lo, hi = cells.limits(Reading(self.program, self._tables, cells).mask(variable("q"), variable("q")))
        return bool(np.any(np.maximum(np.abs(lo), np.abs(hi)) > _NEARLY_ZERO))

    @np.errstate(all="ignore")
    def value_at(self, query: int, key: int, size: int) -> tuple[Array, Array]:
        """Bounds on the mask's value at one place, for each head."""
        cells = self.cells((query, query), (key, key), size=(size, size))
        lo, hi = cells.limits(Reading(self.program, self._tables, cells).mask(variable("q"), variable("k")))
        return np.broadcast_to(lo, len(cells)), np.broadcast_to(hi, len(cells))

    @np.errstate(all="ignore")
    def _find_slopes(self) -> Array:
        """By how much each head's bias grows from key 0 to key 1, as float32 numbers.

        The linear part of the bias has it without the rounding of the two values.
        """
        size = max(2, self.low)
        (own, _), (other, _) = self.value_at(1, 1, size), self.value_at(1, 0, size)
        slopes = own - other
        slopes = np.where(np.abs(slopes) < -HIDDEN, slopes, 0.0)  # false if not a number
        cells = self.cells((1, 1), (0, 1), size=(size, size))
        linear = Reading(self.program, self._tables, cells).mask(variable("q"), variable("k")).terms.get("k")
        if linear is not None:
            rounding = _NEARLY_ZERO + _ROUNDINGS * roundoff(self.dtype) * np.maximum(
                np.abs(own), np.abs(other)
            )
            slopes = np.where(np.abs(linear - slopes) <= rounding, linear, slopes)
        return slopes.astype(np.float32).astype(np.float64)

    def window_and_chunk(self) -> tuple[int | None, int | None]:
        """The only window and chunk that the mask can have, by two of its lines, in its first head.

        Key 0 is seen by the first window or chunk of queries; the key before a query is hidden from the
        first query of a chunk.
        """

        def seen(reading: Reading) -> tuple[Array, Array]:
            visible, hidden, is_rough = self.visibility(reading)
            return (visible.lo >= 1) | (hidden.hi <= 0) | is_rough, (hidden.lo >= 1) & (visible.hi <= 0)

        def hidden(reading: Reading) -> tuple[Array, Array]:
            return seen(reading)[::-1]

        def first_query(cells: Cells, judge: Judge) -> int:
            point = self.first_no(cells, judge)
            return self.high if point is None else point.query

        end = first_query(self.cells(key=(0, 0), lag=(0, self.high), heads=1), seen)
        start = first_query(self.cells(lag=(1, 1), heads=1), seen)
        if min(start, end) <= 1:
            return (1, None) if end == 1 else (None, None)
        last = self.high - 1
        if end < start and first_query(self.cells((end, last), key=(0, 0), heads=1), hidden) < self.high:
            end = self.high  # key 0 is seen again, so that this was not the end of a window
        return (end if end < start else None), (start if start < self.high else None)

    def _point(self, cells: Cells) -> Point:
        """The first point of the cells."""
        query, key, size = cells.first()
        at = np.lexsort((size, key, query))[0]
        place = int(query[at]), int(key[at]), int(size[at])
        lo, hi = self.value_at(*place)
        head = int(cells.head[at])
        return Point(head, *place, float(lo[head]), float(hi[head]))
