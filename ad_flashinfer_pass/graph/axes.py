"""Which axes a tensor of a graph has, followed through the views between one node and another.

A dimension is a tuple of axes, outermost first: ``[b * n, s, d]`` after ``view`` from ``[b, n, s, d]`` is
``((b, n), (s,), (d,))``, and a dimension of size one is ``()``. So a layout need not be recognised: merged,
split, grouped and transposed heads are the same axes in other places, and an axis that an ``expand`` made is
one that its source lacks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import SymInt, fx

from ad_flashinfer_pass.graph import edit as g

aten = torch.ops.aten

VIEWS = (
    aten.view,
    aten.reshape,
    aten._unsafe_view,
    aten.flatten,
    aten.unflatten,
    aten.unsqueeze,
    aten.squeeze,
    aten.view_as,
    aten.reshape_as,
    aten._reshape_alias,
)
"""Keep the elements in order."""
PERMUTATIONS = (
    aten.permute,
    aten.transpose,
    aten.t,
    aten.numpy_T,
    aten.mT,
    aten.adjoint,
    aten.swapaxes,
    aten.swapdims,
    aten.movedim,
    aten.moveaxis,
)
EXPANSIONS = (aten.expand, aten.expand_as, aten.broadcast_to)


class Size:
    """A size as a product: an integer, and symbols with their powers."""

    def __init__(self, constant: int, symbols: Counter[str]) -> None:
        self.constant, self.symbols = constant, symbols

    @classmethod
    def of(cls, size: int | SymInt) -> Size:
        """Read a size of a shape; a sum counts as one symbol."""
        if not isinstance(size, SymInt):
            return cls(size, Counter())
        constant, symbols = 1, Counter[str]()
        for factor, power in size.node.expr.as_powers_dict().items():
            if factor.is_Integer and power.is_Integer and power > 0:
                constant *= int(factor) ** int(power)
            else:
                symbols[str(factor)] += int(power) if power.is_Integer else 1
        return cls(constant, symbols)

    @property
    def is_one(self) -> bool:
        """Whether there is one element."""
        return self.constant == 1 and not self.symbols

    def times(self, other: Size) -> Size:
        """The product."""
        return Size(self.constant * other.constant, self.symbols + other.symbols)

    def over(self, other: Size) -> Size | None:
        """The quotient, None if it is no product of integers and symbols."""
        if (
            not other.constant
            or self.constant % other.constant
            or any(self.symbols[name] < power for name, power in other.symbols.items())
        ):
            return None
        return Size(self.constant // other.constant, self.symbols - other.symbols)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size) and (self.constant, self.symbols) == (other.constant, other.symbols)

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        names = sorted(self.symbols.elements())
        return "*".join([*names, *([str(self.constant)] if self.constant != 1 or not names else [])])


class Axis:
    """One index of a computation, equal to itself alone; a view can split it into others."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self._parts: tuple[Axis, ...] = ()

    def split(self, outer: Size, inner: Size) -> tuple[Axis, Axis]:
        """Two axes in its place, wherever it stands."""
        parts = Axis(outer), Axis(inner)
        self._parts = parts
        return parts

    def parts(self) -> tuple[Axis, ...]:
        """What it was split into, itself if it was not."""
        if not self._parts:
            return (self,)
        return tuple(part for axis in self._parts for part in axis.parts())

    @property
    def is_dynamic(self) -> bool:
        """Whether the size is known only when the graph runs."""
        return bool(self.size.symbols)

    def __repr__(self) -> str:
        return f"<{self.size}>"


Dims: TypeAlias = tuple[tuple[Axis, ...], ...]


def of_shape(shape: Iterable[int | SymInt]) -> Dims:
    """New axes, one a dimension."""
    sizes = [Size.of(size) for size in shape]
    return tuple(() if size.is_one else (Axis(size),) for size in sizes)


def whole(dims: Dims) -> Dims:
    """The same with every split axis replaced by its parts."""
    return tuple(tuple(part for axis in dim for part in axis.parts()) for dim in dims)


def flat(dims: Dims) -> tuple[Axis, ...]:
    """All axes, in order."""
    return tuple(axis for dim in whole(dims) for axis in dim)


def size_of(axes: Iterable[Axis]) -> Size:
    """Size of a dimension."""
    size = Size.of(1)
    for axis in axes:
        size = size.times(axis.size)
    return size


def regrouped(dims: Dims, shape: Sequence[int | SymInt]) -> Dims | None:
    """The axes in another shape of the same elements in the same order; splits axes where it must.

    None if some size is no product of whole parts.
    """
    axes, result = list(flat(dims)), []
    for size in shape:
        need, group = Size.of(size), []
        while not need.is_one:
            if not axes:
                return None
            rest = need.over(axes[0].size)
            if rest is not None:
                group.append(axes.pop(0))
                need = rest
                continue
            inner = axes[0].size.over(need)
            if inner is None:
                return None
            outer, axes[0] = axes[0].split(need, inner)
            group.append(outer)
            need = Size(1, Counter())
        result.append(tuple(group))
    return None if axes else tuple(result)


def aligned(shape: Sequence[int | SymInt], dims: Dims) -> Dims:
    """Axes of a tensor that is broadcast to one with ``dims``."""
    tail = dims[len(dims) - len(shape) :]
    return tuple(() if Size.of(size).is_one else dim for size, dim in zip(shape, tail, strict=True))


def before(node: fx.Node, dims: Dims) -> tuple[fx.Node, Dims] | None:
    """(source, its axes) if the node is a view, or holds copies, of the source; None for another op."""
    source: Any = node.args[0] if node.args else None
    if not _is_view(node, source):
        return None
    dims = whole(dims)
    old = g.shape(source)
    found: Dims | None = None
    if g.is_op(node, *VIEWS):
        found = regrouped(dims, old)
    elif (order := order_of(node)) is not None:
        found = tuple(dims[order.index(dim)] for dim in range(len(order)))
    elif g.is_op(node, *EXPANSIONS):
        tail = dims[len(dims) - len(old) :]
        found = tuple(() if Size.of(size).is_one else dim for size, dim in zip(old, tail, strict=True))
    elif g.is_op(node, aten.repeat_interleave):
        found = _without_repeats(node, dims)
    elif g.is_op(node, aten.repeat):
        found = _without_tiles(node, dims)
    return None if found is None else (source, found)


def after(node: fx.Node, dims: Dims) -> Dims | None:
    """Axes of a view whose source has ``dims``; None for another op, and for one that adds an axis."""
    if not _is_view(node, node.args[0]):
        return None
    if g.is_op(node, *VIEWS):
        return regrouped(dims, g.shape(node))
    order = order_of(node)
    if order is not None:
        return tuple(whole(dims)[dim] for dim in order)
    if g.is_op(node, *EXPANSIONS) and g.same_shape(g.shape(node), g.shape(g.args(node)[0])):
        return dims
    return None


def _is_view(node: fx.Node, source: Any) -> bool:
    """Whether both are tensors of one dtype: a view as another dtype reads other numbers."""
    return g.is_tensor(node) and g.is_tensor(source) and g.value(node).dtype == g.value(source).dtype


def order_of(node: fx.Node) -> list[int] | None:
    """For each dimension of a permutation, that of its source; None for another op."""
    if not g.is_op(node, *PERMUTATIONS):
        return None
    probe = torch.empty([*range(2, 2 + g.value(node).dim())], device="meta")
    return [size - 2 for size in node.target(probe, *node.args[1:], **node.kwargs).shape]  # type: ignore[operator]


def _without_repeats(node: fx.Node, dims: Dims) -> Dims | None:
    """Axes of x for repeat_interleave(x, n, dim): each element n times, so the copies are the inner axis."""
    times, dim = g.op_args(node).get("repeats"), g.op_args(node).get("dim")
    if not isinstance(times, int) or not isinstance(dim, int):
        return None
    dim %= len(dims)
    old = g.shape(g.args(node)[0])[dim]
    found = regrouped((dims[dim],), (old, times))
    return None if found is None else (*dims[:dim], found[0], *dims[dim + 1 :])


def _without_tiles(node: fx.Node, dims: Dims) -> Dims | None:
    """Axes of x for repeat(x, ...): the whole n times, so that the copies are the outer axis."""
    old, times = g.shape(g.args(node)[0]), g.args(node)[1]
    if not all(isinstance(n, int) for n in times):
        return None
    result = []
    added = len(times) - len(old)
    for dim, axes in enumerate(dims[added:]):
        found = regrouped((axes,), (times[added + dim], old[dim]))
        if found is None:
            return None
        result.append(found[1])
    return tuple(result)


def arrange(
    graph: fx.Graph, node: fx.Node, dims: Dims, wanted: Dims, *, broadcasts: bool = False
) -> fx.Node | None:
    """A node with the axes of ``node`` as ``wanted``, at the graph's insertion point.

    Axes of ``wanted`` that the node lacks are expanded; with ``broadcasts``, a dimension of which it has none
    gets size one. None if the node has other axes, lacks one of unknown size, or has two of unknown size in
    one dimension.
    """
    dims, wanted, have = whole(dims), whole(wanted), set(flat(dims))
    if broadcasts:
        wanted = tuple(dim if have & set(dim) else () for dim in wanted)
    if dims == wanted:
        return node
    if not have <= set(flat(wanted)):
        return None
    units = [*_units(dims, wanted)]
    current: list[tuple[Axis, ...]] = []
    for dim in dims:
        pieces = [unit for unit in units if unit and unit[0] in dim]
        if len(pieces) > 1:
            sizes = [_known(unit) for unit in pieces]
            if sizes.count(-1) > 1:
                return None
            node = _call(graph, aten.unflatten.int, node, len(current), sizes)
        current += pieces or [()]
    # A batch of one stays where it is: what reads a transpose for any batch reads it for this one.
    kept = next((at for at, pair in enumerate(zip(dims, wanted, strict=False)) if any(pair)), 0)
    node = _permuted(graph, node, current, [unit for dim in wanted for unit in _in(units, dim)], kept)
    return _grouped(graph, node, wanted, units, kept)


def _units(dims: Dims, wanted: Dims) -> Iterable[tuple[Axis, ...]]:
    """The longest runs of axes that stand together in both."""
    place = {axis: (at, index) for at, dim in enumerate(wanted) for index, axis in enumerate(dim)}
    for dim in dims:
        run: list[Axis] = []
        for axis in dim:
            follows = run and place.get(axis) == (place[run[-1]][0], place[run[-1]][1] + 1)
            if run and not follows:
                yield tuple(run)
                run = []
            run.append(axis)
        if run:
            yield tuple(run)


def _in(units: Sequence[tuple[Axis, ...]], dim: tuple[Axis, ...]) -> list[tuple[Axis, ...]]:
    """The units of a wanted dimension, in its order."""
    return sorted((unit for unit in units if unit[0] in dim), key=lambda unit: dim.index(unit[0]))


def _permuted(
    graph: fx.Graph,
    node: fx.Node,
    current: list[tuple[Axis, ...]],
    wanted: list[tuple[Axis, ...]],
    kept: int,
) -> fx.Node:
    """The node with its units as wanted and without dimensions of size one but the first ``kept``."""
    for dim in reversed([dim for dim, unit in enumerate(current) if not unit and dim >= kept]):
        node = _call(graph, aten.squeeze.dim, node, dim)
    present = [unit for unit in current if unit]
    order = [*range(kept), *(kept + present.index(unit) for unit in wanted)]
    if order == [0, 2, 1, 3]:
        return _call(graph, aten.transpose.int, node, 1, 2)
    return node if order == sorted(order) else _call(graph, aten.permute.default, node, order)


def _grouped(
    graph: fx.Graph, node: fx.Node, wanted: Dims, units: list[tuple[Axis, ...]], kept: int
) -> fx.Node | None:
    """Join the units of each wanted dimension after the first ``kept``, with missing ones expanded."""
    for at, dim in list(enumerate(wanted))[kept:]:
        pieces = _in(units, dim)
        if not dim:
            node = _call(graph, aten.unsqueeze.default, node, at)
            continue
        have = {axis for unit in pieces for axis in unit}
        parts: list[tuple[Axis, ...]] = []
        for axis in dim:
            unit = next((u for u in pieces if u[0] is axis), None)
            if unit is not None:
                parts.append(unit)
            elif axis not in have:
                if axis.is_dynamic:
                    return None
                node = _call(graph, aten.unsqueeze.default, node, at + len(parts))
                sizes = [-1] * g.value(node).dim()
                sizes[at + len(parts)] = axis.size.constant
                node = _call(graph, aten.expand.default, node, sizes)
                parts.append((axis,))
        if len(parts) > 1:
            node = _call(graph, aten.flatten.using_ints, node, at, at + len(parts) - 1)
    return node


def _known(unit: Sequence[Axis]) -> int:
    """Size of a unit, -1 if it is dynamic."""
    size = 1
    for axis in unit:
        if axis.is_dynamic:
            return -1
        size *= axis.size.constant
    return size


def _call(graph: fx.Graph, target: Any, source: fx.Node, *args: Any) -> fx.Node:
    """A call of an op; the one that an earlier site made of the same source, if there is one.

    Sites are rewritten in order, so that an earlier one's node stands before. That two sites read one node is
    how a cache is known to be shared.
    """
    for user in source.users:
        if user.meta.get("arranged") and user.target is target and user.args == (source, *args):
            return user
    node = g.call_op(graph, target, source, *args)
    node.meta["arranged"] = True
    return node
