"""Where the elements of a tensor of tokens come from, through views, cuts, joins and copies.

Such a tensor has axes of tokens, whose sizes need not be known, and others of known size, as heads and their
elements. The first are followed as they are (``axes``), of the others each index is: a cut adds to it, a join
tells the parts apart by it. So it does not matter how a model takes a projection apart.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.axes import Axis, Dims, Size

aten = torch.ops.aten
_COPIES = (aten.clone, aten.contiguous, aten.alias, aten.detach)
_CUTS = (aten.split_with_sizes, aten.split, aten.chunk, aten.tensor_split, aten.unsafe_chunk)


class Source(NamedTuple):
    """A tensor, and which of its elements are some of those that are traced, the same for every token."""

    node: fx.Node
    dims: Dims
    """Axes of the node."""
    places: Tensor
    """int64 [n]: numbers of the traced elements, ascending."""
    coordinates: Mapping[Axis, Tensor]
    """int64 [n]: where each of them is, along each axis of the node that is not one of tokens."""

    def along(self, dim: int) -> Tensor | None:
        """int64 [n]: where each element is along a dimension; None if the tokens are there."""
        axes, index = ax.whole(self.dims)[dim], _split(self.coordinates)
        return self._number(axes, index) if all(axis in index for axis in axes) else None

    def flat(self) -> Tensor:
        """int64 [n]: where each element is among all that one token has."""
        index = _split(self.coordinates)
        return self._number([axis for axis in ax.flat(self.dims) if axis in index], index)

    @property
    def tokens(self) -> Dims:
        """The axes of tokens."""
        index = _split(self.coordinates)
        return tuple(tuple(axis for axis in dim if axis not in index) for dim in ax.whole(self.dims))

    def _number(self, axes: Iterable[Axis], index: Mapping[Axis, Tensor]) -> Tensor:
        at = torch.zeros_like(self.places)
        for axis in axes:
            at = at * axis.size.constant + index[axis]
        return at

    def _of(self, node: fx.Node, dims: Dims) -> Source:
        """The same elements of a view's source."""
        kept, index = set(ax.flat(dims)), _split(self.coordinates)
        return Source(node, dims, self.places, {axis: at for axis, at in index.items() if axis in kept})

    def _at(self, node: fx.Node, dim: int, at: Tensor, mask: Tensor | None = None) -> Source | None:
        """Those elements within ``mask``, in a tensor in which ``at`` says where they are along ``dim``."""
        size = g.shape(node)[dim]
        if not isinstance(size, int) or len(g.shape(node)) != len(self.dims):
            return None
        here = torch.ones_like(at, dtype=torch.bool) if mask is None else mask
        old, axis = ax.whole(self.dims), Axis(Size.of(size))
        index = {
            each: values[here] for each, values in _split(self.coordinates).items() if each not in old[dim]
        }
        if size != 1:
            index[axis] = at[here]
        dims = (*old[:dim], (axis,) if size != 1 else (), *old[dim + 1 :])
        return Source(node, dims, self.places[here], index)


def trace(node: fx.Node, tokens: Dims, stop: Callable[[Source], bool]) -> list[Source]:
    """The tensors from which all elements come that one token has in a tensor.

    Args:
        node: a tensor whose first dimensions are those of tokens, the others of known size.
        tokens: axes of the first dimensions.
        stop: whether to go no further; else that is where an op computes something.

    Returns:
        Each with some of the elements, which are numbered as they lie in the last dimensions of ``node``.
    """
    rest = ax.of_shape(g.shape(node)[len(tokens) :])
    sizes = [axis.size.constant for axis in ax.flat(rest)]
    places = torch.arange(torch.Size(sizes).numel())
    index = torch.unravel_index(places, sizes) if sizes else ()
    found, left = [], [Source(node, (*tokens, *rest), places, dict(zip(ax.flat(rest), index, strict=True)))]
    while left:
        source = left.pop()
        if not len(source.places):
            continue
        before = None if stop(source) else _before(source)
        if before is None:
            found.append(source)
        else:
            left += before
    return found


def _split(index: Mapping[Axis, Tensor]) -> dict[Axis, Tensor]:
    """By the parts of axes that were split meanwhile."""
    parts: dict[Axis, Tensor] = {}
    for axis, at in index.items():
        for part in reversed(axis.parts()):
            parts[part] = at % part.size.constant
            at = at // part.size.constant
    return parts


def _before(source: Source) -> list[Source] | None:
    """Where the elements come from by one op; None if it computes them."""
    node = source.node
    if g.is_op(node, *_COPIES):
        return [source._of(g.args(node)[0], source.dims)]
    if (view := ax.before(node, source.dims)) is not None:
        return [source._of(*view)]
    if g.is_op(node, operator.getitem):
        return _part(source)
    if not g.is_op(node, aten.slice, aten.cat, aten.slice_scatter):
        return None
    args = g.op_args(node)
    dim = args["dim"] % len(source.dims)
    at = source.along(dim)
    if at is None:
        return None
    if g.is_op(node, aten.cat):
        return _parts(source, args["tensors"], dim, at)
    size = g.shape(args["self"])[dim]
    if not isinstance(size, int) or not all(
        isinstance(args[n], int | None) for n in ("start", "end", "step")
    ):
        return None
    start, end, step = slice(args["start"], args["end"], args["step"]).indices(size)
    if g.is_op(node, aten.slice):
        return _all(source._at(args["self"], dim, at * step + start))
    inside = (at >= start) & (at < end) & ((at - start) % step == 0)
    over = source._at(args["src"], dim, (at - start) // step, inside)
    return _all(over, source._at(args["self"], dim, at, ~inside))


def _part(source: Source) -> list[Source] | None:
    """Of one result of an op that cuts."""
    cut, number = g.args(source.node)
    if not g.is_op(cut, *_CUTS):
        return None
    args = g.op_args(cut)
    dim = args["dim"] % len(source.dims)
    at, first = source.along(dim), sum(part.shape[dim] for part in g.tensors(cut)[:number])
    if at is None or not isinstance(first, int):
        return None
    return _all(source._at(g.args(cut)[0], dim, at + first))


def _parts(source: Source, parts: list[fx.Node], dim: int, at: Tensor) -> list[Source] | None:
    """Of what a cat joins."""
    found, start = [], 0
    for part in parts:
        if len(g.shape(part)) != len(source.dims) or not isinstance(size := g.shape(part)[dim], int):
            return None
        found.append(source._at(part, dim, at - start, (at >= start) & (at < start + size)))
        start += size
    return _all(*found)


def _all(*sources: Source | None) -> list[Source] | None:
    known = [source for source in sources if source is not None]
    return known if len(known) == len(sources) else None
