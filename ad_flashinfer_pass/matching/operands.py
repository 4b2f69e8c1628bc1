"""Where the query, the key and the value of an attention are taken from, and by which axes.

Layouts are not recognised but followed: every step carries the axes of its tensor (see ``axes``), so heads
may be merged with the batch, grouped, repeated or transposed, by whatever views.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import torch
from torch import fx

from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.axes import Axis, Dims, Size
from ad_flashinfer_pass.matching.nodes import (
    CASTS,
    FLOATS,
    refuse,
    scalar_factor,
    skip_upcasts,
    source_node,
)
from ad_flashinfer_pass.matching.parts import AttentionMatch, Operand, Place, SiteAxes

aten = torch.ops.aten


def matched(
    match: AttentionMatch,
    logits: Dims,
    keys: tuple[Axis, ...],
    query: tuple[list[Place], tuple[Axis, ...]],
    key: list[Place],
    value: tuple[list[Place], tuple[Axis, ...]],
) -> AttentionMatch:
    """Fill in the axes, told apart by who has them, and where query, key and value are taken from.

    Raises:
        UnsupportedError: the axes are not those of an attention of tokens to the same tokens.
    """
    node = match.result.node
    cached = {*ax.flat(key[-1].dims), *ax.flat(value[0][-1].dims)}
    every, keys = [axis for axis in ax.flat(logits) if axis not in ax.flat((keys,))], ax.flat((keys,))
    queries = [a for a in every if len(keys) == 1 and a.size == keys[0].size and a not in cached]
    if not queries:
        raise refuse(
            node,
            f"has logits of shape ({', '.join(str(ax.size_of(dim)) for dim in logits)}) that are not of "
            "tokens to the same tokens; export the model without a cache: cross-attention and keys in blocks "
            "have no place in it",
        )
    others = [part for axis in every if axis is not queries[-1] for part in _batch_apart(axis)]
    cached = {*ax.flat(key[-1].dims), *ax.flat(value[0][-1].dims)}
    batch = [axis for axis in others if axis.is_dynamic]
    if not batch and len(logits) > 3:
        batch = [axis for axis in ax.whole(logits)[0] if axis in others]
    heads = [axis for axis in others if axis not in batch]
    match.axes = SiteAxes(
        batch=tuple(batch),
        kv_heads=tuple(axis for axis in heads if axis in cached),
        group=tuple(axis for axis in heads if axis not in cached),
        queries=(queries[-1],),
        keys=keys,
        head_dim=ax.flat((query[1],)),
        v_head_dim=ax.flat((value[1],)),
    )
    places = _taken(node, query[0], match.axes.query), _taken(node, key, match.axes.key)
    match.query, match.key = (Operand(place.node, place.dims) for place in places)
    match.scale *= places[0].factor * places[1].factor
    place = _taken(node, value[0], match.axes.value)
    match.value = Operand(place.node, place.dims)
    return match


def _batch_apart(axis: Axis) -> tuple[Axis, ...]:
    """A merged axis of batch and heads as two; ``check_packing`` follows both and sees whether they are."""
    if not axis.is_dynamic or axis.size.constant == 1:
        return (axis,)
    return axis.split(Size(1, axis.size.symbols), Size.of(axis.size.constant))


def _taken(node: fx.Node, places: list[Place], wanted: Dims) -> Place:
    """The place with the fewest axes, farthest back, that has the wanted dimensions in some order.

    Raises:
        UnsupportedError: it has axes that the attention has not.
    """
    axes = set(ax.flat(places[-1].dims))
    if not axes <= set(ax.flat(wanted)):
        raise refuse(node, f"has an operand of shape {tuple(g.shape(places[-1].node))} that no kernel takes")
    dims = {tuple(axis for axis in dim if axis in axes) for dim in wanted}
    fewest = [place for place in places if set(ax.flat(place.dims)) == axes]
    plain = [place for place in fewest if {*ax.whole(place.dims), ()} == {*dims, ()}]
    usable = [p for p in fewest if all(sum(a.is_dynamic for a in dim) < 2 for dim in ax.whole(p.dims))]
    return (plain or usable or fewest)[-1]


def walk(node: fx.Node, dims: Dims, scaled: bool = False) -> list[Place]:
    """The node and those before it that hold the same numbers: before views, copies, casts to float32.

    ``scaled``: also before a multiplication by a constant.
    """
    places = [Place(node, dims)]
    factor = 1.0
    while True:
        viewed = ax.before(node, dims)
        scalar = scalar_factor(node) if scaled else None
        if viewed is not None:
            node, dims = viewed
        elif skip_upcasts(node) is not node:
            node = source_node(node, 0)
        elif scalar is not None and g.same_shape(g.shape(scalar[0]), g.shape(node)):
            node, factor = scalar[0], factor * scalar[1]
        else:
            return places
        places.append(Place(node, dims, factor))


def walk_all_casts(node: fx.Node, dims: Dims) -> list[Place]:
    """As ``walk``, but also before casts to shorter formats: sinks are added in float32."""
    places = walk(node, dims)
    while g.is_op(places[-1].node, *CASTS) and g.value(source_node(places[-1].node, 0)).dtype in FLOATS:
        places += walk(source_node(places[-1].node, 0), places[-1].dims)
    return places


def factors(node: fx.Node, dims: Dims) -> tuple[Operand, Operand, tuple[Axis, ...]]:
    """Both operands of a product whose result has ``dims``, and the axes that are summed."""
    if g.is_op(node, aten.einsum):
        (left, right), (a, b), out = einsum(node)
        by_letter = dict(zip(out, dims, strict=True))
        summed = [x for x in a if x in b and x not in out]
        if len(summed) != 1 or set(a + b) - set(out) - set(summed):
            raise refuse(node, f"is the einsum {g.args(node)[0]}, not the product of query and key")
        by_letter[summed[0]] = ax.of_shape(g.shape(left))[a.index(summed[0])]
        left_dims, right_dims = (lettered(x, letters, by_letter) for x, letters in ((left, a), (right, b)))
        return Operand(left, left_dims), Operand(right, right_dims), by_letter[summed[0]]
    first = 1 if g.is_op(node, aten.baddbmm) else 0
    left, right = g.args(node)[first : first + 2]
    if min(g.value(left).dim(), g.value(right).dim()) < 2:
        raise refuse(node, "has a query or key without a dimension of tokens")
    (inner,) = ax.of_shape(g.shape(left)[-1:])
    lead, rows, columns = dims[:-2], dims[-2], dims[-1]
    return (
        Operand(left, (*ax.aligned(g.shape(left)[:-2], lead), rows, inner)),
        Operand(right, (*ax.aligned(g.shape(right)[:-2], lead), inner, columns)),
        inner,
    )


def as_einsum(product: fx.Node) -> tuple[list[fx.Node], list[str], str]:
    """A matrix product as operands, their letters, and those of the result."""
    operands = list(g.args(product)[:2])
    ranks = [g.value(operand).dim() for operand in operands]
    if min(ranks) < 2:
        raise refuse(product, "multiplies the probabilities by a vector")
    lead = string.ascii_lowercase[: max(ranks) - 2]
    letters = [lead[len(lead) + 2 - rank :] + pair for rank, pair in zip(ranks, ("YX", "XZ"), strict=True)]
    return operands, letters, lead + "YZ"


def einsum(node: fx.Node) -> tuple[Sequence[fx.Node], list[str], str]:
    """Operands, their letters, and those of the result.

    Raises:
        UnsupportedError: it is not a written out equation of two tensors.
    """
    equation, operands = g.args(node)[:2]
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if (
        len(operands) != 2
        or not arrow
        or "." in equation
        or any(len({*x}) != len(x) for x in (*letters, out))
    ):
        raise refuse(node, f"is the einsum {equation}, not one of two tensors with all its letters")
    return operands, letters, out


def lettered(node: fx.Node, letters: str, by_letter: dict[str, tuple[Axis, ...]]) -> Dims:
    """Axes of an operand of an einsum; a dimension of size 1 has none, for it is broadcast."""
    sizes = g.shape(node)
    return tuple(() if Size.of(n).is_one else by_letter[x] for x, n in zip(letters, sizes, strict=True))
