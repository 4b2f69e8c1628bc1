"""Attention sinks: one more logit a head, as a column of the softmax or by scaling its result."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.axes import Dims
from ad_flashinfer_pass.matching.nodes import refuse, source_node
from ad_flashinfer_pass.matching.operands import walk_all_casts
from ad_flashinfer_pass.matching.parts import Operand, Place

aten = torch.ops.aten


def sink_of_each_head(node: fx.Node, sinks: fx.Node, dims: Dims) -> Operand:
    """The sinks as one value a head.

    Raises:
        UnsupportedError: they depend on more than the head.
    """
    places = walk_all_casts(sinks, ax.aligned(g.shape(sinks), dims))
    found = places[-1]
    if (
        g.value(found.node).dim() != 1
        or not ax.flat(found.dims)
        or any(a.is_dynamic for a in ax.flat(found.dims))
    ):
        raise refuse(node, "has sinks that are not one value a head")
    return Operand(found.node, found.dims)


def log_sum_exp(logits: fx.Node, dim: int) -> fx.Node | None:
    """The logarithm of the sum over a row of the logits' exponentials, if something takes it."""
    rank = g.value(logits).dim()
    for user in logits.users:
        if g.is_op(user, aten.logsumexp) and [d % rank for d in g.op_args(user)["dim"]] == [dim]:
            return user
    return None


def sinks_by_scaling(lse: fx.Node, rows: Dims, result: Operand) -> tuple[Operand, Operand]:
    """The sinks of sigmoid(lse - sinks) * result, and that product.

    It is the softmax with one more logit a head:
    sum(exp(x)) / (sum(exp(x)) + exp(sink)) = sigmoid(logsumexp(x) - sink).

    Raises:
        UnsupportedError: something else is done with the sum of the exponentials.
    """

    def back(node: fx.Node, dims: Dims) -> Place:
        return walk_all_casts(node, dims)[-1]

    refusal = refuse(
        lse,
        "takes the logarithm of a sum over the logits for something other than sinks, sigmoid(lse - sinks)",
    )
    node, dims = result.node, result.dims
    while len(node.users) == 1 and (viewed := ax.after(next(iter(node.users)), dims)) is not None:
        node, dims = next(iter(node.users)), viewed
    scaled = next(iter(node.users))
    gate: Any = None
    if g.is_op(scaled, aten.mul):
        (gate,) = [n for n in g.args(scaled) if n is not node]
    if len(node.users) != 1 or not g.is_tensor(gate) or not g.same_shape(g.shape(scaled), g.shape(node)):
        raise refusal
    place = back(gate, ax.aligned(g.shape(gate), dims))
    if not g.is_op(place.node, aten.sigmoid):
        raise refusal
    place = back(source_node(place.node, 0), place.dims)
    if not g.is_op(place.node, aten.sub) or g.op_args(place.node)["alpha"] != 1:
        raise refusal
    total, sinks = g.args(place.node)
    if not g.is_tensor(total) or not g.is_tensor(sinks):
        raise refusal
    found = back(total, ax.aligned(g.shape(total), place.dims))
    if found.node is not lse or ax.flat(found.dims) != ax.flat(rows):
        raise refusal
    return sink_of_each_head(lse, sinks, place.dims), Operand(scaled, dims)
