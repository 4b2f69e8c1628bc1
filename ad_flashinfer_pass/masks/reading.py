"""Reading a mask program over regions of the mask, without running it.

The entry of a node at an index is expressed by entries of its arguments, down to index vectors,
positions and constants; ``rules`` says how, op by op. Indices and values are forms, so that one reading
covers all entries of a region at once, and the sizes of tensors do not matter.

A comparison that a region leaves open says where it would be decided: those are the places to split at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.utils._sympy import functions as sym

from ad_flashinfer_pass.errors import MaskError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.masks.forms import (
    KEY,
    LAG,
    NOTHING,
    QUERY,
    SIZE,
    UNIT,
    UNKNOWN,
    Array,
    Cells,
    Form,
    between,
    multiplied,
    number,
    pick,
    some,
    variable,
)
from ad_flashinfer_pass.masks.program import MaskProgram, Shape
from ad_flashinfer_pass.masks.tables import Table

Index: TypeAlias = tuple[Form, ...]

ZERO, ONE = number(0.0), number(1.0)

RULES: dict[Any, Callable[[Call], Form]] = {}
"""The rule of each op packet; ``rules`` fills it."""


def rule_of(node: fx.Node) -> Callable[[Call], Form] | None:
    """The rule of a node's op, if there is one."""
    return RULES.get(getattr(node.target, "overloadpacket", None))


_AXES = {("q",): QUERY, ("k",): KEY, ("s",): SIZE, ("k", "q"): LAG}


class Reading:
    """The values of a program over some cells."""

    def __init__(self, program: MaskProgram, tables: dict[fx.Node, Table], cells: Cells) -> None:
        """``tables``: kept between readings of the same program; filled here."""
        self.program = program
        self.cells = Cells(cells.lo, cells.hi, cells.head, cells.other)
        self.reads_size = False
        # Where to split each cell, -1 if nothing asks for it: exactly, and as a second choice.
        self.split_axis, self.hint_axis = (np.full(len(cells), -1) for _ in range(2))
        self.split_at, self.hint_at = (np.zeros(len(cells), dtype=np.int64) for _ in range(2))
        self._tables = tables
        self._memo: dict[tuple[Any, ...], tuple[Form, Index]] = {}
        self._names = (f"j{n}" for n in itertools.count())

    def mask(self, query: Form, key: Form) -> Form:
        """The mask between a query and a key, in the cell's head and any row."""
        index = (variable("b"), number(self.cells.head), query, key)
        return self.at(self.program.mask, index)

    def at(self, node: fx.Node, index: Index) -> Form:
        """A node's entry, where ``index`` is that of a result that the node is broadcast to."""
        single = self.program.single_dims(node)
        index = index[len(index) - len(single) :]
        own = tuple(ZERO if is_single else at for at, is_single in zip(index, single, strict=True))
        place = (node, *map(id, own))
        if place not in self._memo:
            # The index is kept with the result, because its identity is the name of the place.
            self._memo[place] = (self._read(node, own), own)
        return self._memo[place][0]

    def _read(self, node: fx.Node, index: Index) -> Form:
        if node in self.program.constants:
            if self.program.constants[node].is_complex():
                raise self.program.unknown(node, "of complex numbers")
            if node not in self._tables:
                self._tables[node] = Table(self.program.constants[node])
            return self._tables[node].read(self.cells, index)
        if node.op == "placeholder":
            return self._position(node, index)
        rule = rule_of(node)
        if rule is None:
            raise self.program.unknown(node)
        return rule(Call(self, node, index))

    def _position(self, node: fx.Node, index: Index) -> Form:
        """Positions are consecutive in a row; rows may start at different ones."""
        *row, column = index
        if not row or self.program.single_dims(node)[0] or _is_batch_row(row[0]):
            return column + variable("p")
        return column + between(*self.cells.other["p"], UNIT)

    def size(self, value: float | sympy.Expr) -> Form:
        """A number, a size, or an expression of sizes."""
        if not isinstance(value, sympy.Expr):
            return number(float(value))
        return self.program.evaluate(value, self._symbol, self._algebra)

    def _symbol(self, symbol: sympy.Symbol) -> Form:
        if self.program.symbols[symbol] == "rows":
            return variable("rows")
        self.reads_size = True
        return variable("s")

    @property
    def _algebra(self) -> dict[Any, Callable[..., Form]]:
        return {
            "number": lambda value: number(float(value)),
            sympy.Add: lambda a, b: a + b,
            sympy.Mul: self.product,
            sym.Max: lambda a, b: self.choose(self.le(a, b), b, a),
            sym.Min: lambda a, b: self.choose(self.le(a, b), a, b),
            sym.FloorDiv: self.floor_divide,
        }

    def new_index(self, low: float, high: Array) -> Form:
        """A running index of its own."""
        name = next(self._names)
        self.cells.other[name] = np.array([low]), np.maximum(high, low)
        return variable(name)

    def le(self, a: Form, b: Form, strict: bool = False) -> Form:
        """a <= b, or a < b, as 0 or 1."""
        yes, no = self._compare(a, b, strict)
        for left, right, is_strict in _without_floor(a, b, strict):
            also_yes, also_no = self._compare(left, right, is_strict)
            yes, no = yes | also_yes, no | also_no
        if a.floor_of is not None and b.floor_of is not None and a.floor_of[1] == b.floor_of[1]:
            (x, step), (y, _) = a.floor_of, b.floor_of
            less, more = (number(step), ZERO) if strict else (ZERO, number(step))
            yes = yes | self._compare(x + less, y, False)[0]
            no = no | self._compare(y + more, x, False)[0]
        return between(yes, ~no, UNIT)

    def _compare(self, a: Form, b: Form, strict: bool) -> tuple[Array, Array]:
        """Where a <= b, or a < b, certainly holds, and where it certainly does not."""
        difference = self.cells.absolute(a) - self.cells.absolute(b)
        lo, hi = self.cells.limits(difference)
        yes, no = (hi < 0, lo >= 0) if strict else (hi <= 0, lo > 0)
        if not (yes | no).all():
            # The difference of infinite numbers is not defined.
            (a_lo, a_hi), (b_lo, b_hi) = self.cells.limits(a), self.cells.limits(b)
            # Nothing known of a number may mean that it is none.
            is_number = ~(np.isneginf(a_lo) & np.isposinf(a_hi)) & ~(np.isneginf(b_lo) & np.isposinf(b_hi))
            below, above = (a_hi < b_lo, a_lo >= b_hi) if strict else (a_hi <= b_lo, a_lo > b_hi)
            yes, no = yes | (below & is_number), no | (above & is_number)
            self._ask_for_split(difference, ~(yes | no), strict)
        return yes, no

    def eq(self, a: Form, b: Form) -> Form:
        """a == b, as 0 or 1."""
        return self.both(self.le(a, b), self.le(b, a))

    def both(self, a: Form, b: Form) -> Form:
        """Logical and of two truth values."""
        return between(np.minimum(a.lo, b.lo), np.minimum(a.hi, b.hi), UNIT)

    def either(self, a: Form, b: Form) -> Form:
        """Logical or of two truth values."""
        return between(np.maximum(a.lo, b.lo), np.maximum(a.hi, b.hi), UNIT)

    def choose(self, condition: Form, yes: Form, no: Form) -> Form:
        """``yes`` where the truth value is 1 and ``no`` where it is 0."""
        holds, fails = condition.lo >= 1, condition.hi <= 0
        if holds.all():
            return yes
        if fails.all():
            return no
        chosen = pick(holds, yes, no)
        is_open = ~(holds | fails)
        if not some(is_open):
            return chosen
        (yes_lo, yes_hi), (no_lo, no_hi) = self.cells.limits(yes), self.cells.limits(no)
        either = between(
            np.minimum(yes_lo, no_lo), np.maximum(yes_hi, no_hi), np.minimum(yes.grain, no.grain)
        )
        return pick(is_open, either, chosen)

    def product(self, a: Form, b: Form) -> Form:
        """a * b."""
        a, b = self.cells.settled(a), self.cells.settled(b)
        if a.is_known:
            a, b = b, a
        if b.is_known:
            return a.scaled(b.lo)
        (a_lo, a_hi), (b_lo, b_hi) = self.cells.limits(a), self.cells.limits(b)
        corners = np.broadcast_arrays(a_lo * b_lo, a_lo * b_hi, a_hi * b_lo, a_hi * b_hi)
        return between(np.min(corners, axis=0), np.max(corners, axis=0), multiplied(a.grain, b.grain))

    def quotient(self, a: Form, b: Form) -> Form:
        """a / b, for a b that is known, finite and not 0."""
        a, b = self.cells.settled(a), self.cells.settled(b)
        if not b.is_known or not np.all(np.isfinite(b.lo) & (b.lo != 0)):
            return UNKNOWN
        is_power = np.abs(np.frexp(b.lo)[0]) == 0.5
        grain = np.where(is_power, a.grain / np.abs(b.lo), 0.0)
        terms = {var: factor / b.lo for var, factor in a.terms.items()}
        ends = a.lo / b.lo, a.hi / b.lo
        return Form(np.minimum(*ends), np.maximum(*ends), terms, grain, a.error)

    def floor_divide(self, a: Form, b: Form) -> Form:
        """floor(a / b) for a constant b > 0."""
        return self._divided(a, b)[0]

    def remainder(self, a: Form, b: Form) -> Form:
        """a - b * floor(a / b) for a constant b > 0."""
        return self._divided(a, b)[1]

    def _divided(self, a: Form, b: Form) -> tuple[Form, Form]:
        if not b.is_known or len(set(b.lo.tolist())) != 1 or b.lo[0] <= 0:
            return UNKNOWN, UNKNOWN
        a, divisor = self.cells.absolute(a), float(b.lo[0])
        # What is a multiple of the divisor, whatever its variable, divides without a rest.
        is_whole = {var: a.is_integer and not some(factor % divisor) for var, factor in a.terms.items()}
        whole = {var: factor for var, factor in a.terms.items() if is_whole[var]}
        rest = Form(a.lo, a.hi, {var: f for var, f in a.terms.items() if not is_whole[var]}, a.grain)
        lo, hi = self.cells.limits(rest)
        first, last = np.floor_divide(lo, divisor), np.floor_divide(hi, divisor)
        self._hint_split(rest, divisor, first != last)
        quotient = between(first, last, UNIT)
        remainder = pick(
            first == last,
            rest + replace(number(-divisor * first), grain=np.minimum(rest.grain, UNIT)),
            between(np.array([0.0]), np.array([divisor - (1 if a.is_integer else 0)]), a.grain),
        )
        if whole:
            quotient += Form(ZERO.lo, ZERO.hi, {var: f / divisor for var, f in whole.items()}, UNIT)
        elif a.is_integer:
            quotient = replace(quotient, floor_of=(a, divisor))
        return quotient, remainder

    def _ask_for_split(self, difference: Form, is_open: Array, strict: bool) -> None:
        """Split where ``difference`` crosses 0."""
        names = tuple(sorted(difference.terms))
        is_open = is_open & (difference.lo == difference.hi)
        if names not in _AXES or not some(is_open):
            return
        axis = _AXES[names]
        factor = difference.terms[names[-1]]
        if axis == LAG and np.any(difference.terms["k"] != -difference.terms["q"]):
            return
        zero = -difference.lo / factor
        at = np.where((factor > 0) != strict, np.floor(zero) + 1, np.ceil(zero))
        self._vote(self.split_axis, self.split_at, axis, at, is_open)

    def _hint_split(self, form: Form, step: float, is_open: Array) -> None:
        """Split near the middle, where ``form`` is a multiple of ``step``."""
        names = tuple(sorted(form.terms))
        if names not in _AXES or len(names) > 1 or np.any(form.terms[names[0]] != 1) or not some(is_open):
            return
        axis = _AXES[names]
        middle = (self.cells.lo[axis] + self.cells.hi[axis] + 1) // 2
        at = np.round((middle + form.lo) / step) * step - form.lo
        self._vote(self.hint_axis, self.hint_at, axis, at, is_open)

    def _vote(self, axes: Array, places: Array, axis: int, at: Array, is_open: Array) -> None:
        wanted = is_open & (axes < 0) & (at > self.cells.lo[axis]) & (at <= self.cells.hi[axis])
        axes[wanted] = axis
        places[wanted] = np.broadcast_to(at, wanted.shape)[wanted]

    def split(self) -> tuple[Array, Array]:
        """Axis and place at which to split each cell; axis -1 where it has only one point left."""
        axis, at = self.split_axis.copy(), self.split_at.copy()
        for axes, places in ((self.hint_axis, self.hint_at), self._halves()):
            missing = axis < 0
            axis[missing], at[missing] = axes[missing], places[missing]
        return axis, at

    def _halves(self) -> tuple[Array, Array]:
        extents = self.cells.hi - self.cells.lo
        extents[LAG] = 0
        largest = extents[: SIZE if not self.reads_size else SIZE + 1].argmax(0)
        everywhere = np.arange(len(self.cells))
        lo, hi = self.cells.lo[largest, everywhere], self.cells.hi[largest, everywhere]
        return np.where(lo < hi, largest, -1), (lo + hi + 1) // 2


def _without_floor(a: Form, b: Form, strict: bool) -> Iterator[tuple[Form, Form, bool]]:
    """The same comparison of x itself, where one side is floor(x / c) and the other an integer."""
    if a.floor_of is not None and not b.terms and b.is_integer:
        x, c = a.floor_of
        beyond = 0 if strict else c  # x // c < b if x < c * b, and x // c <= b if x < c * b + c
        yield x, between(c * b.lo + beyond, c * b.hi + beyond, UNIT), True
    if b.floor_of is not None and not a.terms and a.is_integer:
        x, c = b.floor_of
        beyond = c if strict else 0  # a < x // c if c * a + c <= x, and a <= x // c if c * a <= x
        yield between(c * a.lo + beyond, c * a.hi + beyond, UNIT), x, False


def _is_batch_row(place: Form) -> bool:
    """Whether a place is the row of the batch that is looked at."""
    return (
        place.terms.keys() == {"b"}
        and not some(place.lo)
        and not some(place.hi)
        and not some(place.terms["b"] - 1)
    )


class Call:
    """One op at one index of its result."""

    def __init__(self, reading: Reading, node: fx.Node, index: Index) -> None:
        self.reading, self.node, self.index = reading, node, index
        self.args = reading.program.args[node]
        self.dtype: torch.dtype = g.value(node).dtype

    def unknown(self, what: str = "") -> MaskError:
        """The refusal of this op."""
        return self.reading.program.unknown(self.node, what)

    def form(self, name: str, dtype: torch.dtype | None = None) -> Form:
        """An argument, tensor or scalar, at this index, as stored in ``dtype``."""
        arg = self.args[name]
        if not isinstance(arg, fx.Node):
            return self.store(self.reading.size(arg), dtype)
        form = self.reading.at(arg, self.index)
        return form if dtype is None else self.cast(form, g.value(arg).dtype, dtype)

    def operands(self, dtype: torch.dtype | None = None) -> tuple[Form, Form]:
        """``self`` and ``other``, in the dtype that the op computes in."""
        dtype = dtype or self.reading.program.compute_dtype(self.node)
        return self._operand("self", dtype), self._operand("other", dtype)

    def _operand(self, name: str, dtype: torch.dtype) -> Form:
        form = self.form(name, dtype)
        if isinstance(self.args[name], fx.Node) or dtype not in (torch.bfloat16, torch.float16):
            return form
        # Some kernels round a scalar to a short format first, and some do not.
        exact = self.reading.size(self.args[name])
        return between(
            np.minimum(form.lo, exact.lo), np.maximum(form.hi, exact.hi), form.grain * (form.lo == exact.lo)
        )

    def store(self, form: Form, dtype: torch.dtype | None = None) -> Form:
        """A result in the op's dtype, or in another."""
        dtype = dtype or self.dtype
        return form if dtype == torch.bool else self.reading.cells.rounded(form, dtype)

    def cast(self, form: Form, source: torch.dtype, target: torch.dtype) -> Form:
        """A value of one dtype in another."""
        if source == target:
            return form
        if target == torch.bool:
            return negated(self.reading.eq(form, ZERO))
        if source.is_floating_point and not target.is_floating_point:
            form = self.monotone(form, np.trunc, UNIT)
        return self.store(form, target)

    def monotone(self, form: Form, function: Callable[[Array], Array], grain: Array = NOTHING) -> Form:
        """A rising function of the form; one that only rounds to integers leaves integers alone."""
        if grain is UNIT and form.is_integer:
            return form
        lo, hi = (function(limit) for limit in self.reading.cells.limits(form))
        is_number = ~(np.isnan(lo) | np.isnan(hi))
        return between(np.where(is_number, lo, -np.inf), np.where(is_number, hi, np.inf), grain)

    def shape(self, name: str = "self") -> Shape:
        """Sizes of an argument."""
        return self.reading.program.shape(self.args[name])

    def dim(self, name: str = "dim") -> int:
        """A dimension of ``self``, from 0."""
        return self.args[name] % len(self.shape())

    def at(self, name: str, index: Index) -> Form:
        """An argument at another index, given in its own dimensions."""
        return self.reading.at(self.args[name], index)

    def moved(self, dim: int, place: Form) -> Index:
        """This index with another place in one dimension."""
        return (*self.index[:dim], place, *self.index[dim + 1 :])

    def size(self, dim: int, name: str = "self") -> Form:
        """The size of an argument in one dimension."""
        return self.reading.size(self.shape(name)[dim])


def negated(truth: Form) -> Form:
    """Logical not of a truth value."""
    return between(1 - truth.hi, 1 - truth.lo, UNIT)
