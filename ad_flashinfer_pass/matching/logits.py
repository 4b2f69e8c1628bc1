"""Reads back from a softmax to the query-key product: what is done to the logits on the way.

The logits are a sum and product of known parts: a product of query and key, constant factors, one cap,
additive or boolean masks, sinks. Each part is kept, or the chain is refused; no part is passed over.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ad_flashinfer_pass import masks
from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.axes import Dims, Size
from ad_flashinfer_pass.matching.nodes import (
    CASTS,
    COPIES,
    FLOATS,
    PRODUCTS,
    constant_fill,
    contains_product,
    is_identity_dropout,
    is_zero_or_one,
    reads_shape,
    refuse,
    same,
    scalar_factor,
    skip,
    source_node,
)
from ad_flashinfer_pass.matching.parts import MaskTerm, Operand
from ad_flashinfer_pass.matching.sinks import sink_of_each_head

aten = torch.ops.aten


class LogitsReader:
    """Walks from the softmax to the query-key product and collects what is done to the logits."""

    def __init__(self, dims: Dims, dim: int) -> None:
        self.dims, self.keys = dims, dims[dim]
        """Axes of the node that was reached, and those of the keys, without the column of sinks."""
        self.passed: list[fx.Node] = []
        self.terms: list[MaskTerm] = []
        self.scale = 1.0
        """Of the product; until the product is reached, of everything below the current node."""
        self.logit_cap: float | None = None
        self.sinks: Operand | None = None
        self.temperatures: list[tuple[Operand, bool]] = []
        """Of the product; until the product is reached, of everything below the current node."""
        self.readers: list[fx.Node] = []
        """Nodes beside the path whose reading of the logits is accounted for."""

    def read(self, node: fx.Node) -> fx.Node:
        """Read on until the product and return it.

        Raises:
            UnsupportedError: a node that is none of the known parts.
        """
        while not g.is_op(node, *PRODUCTS):
            self.passed.append(node)
            node = self._step(node)
            self.dims = ax.aligned(g.shape(node), self.dims)
        if g.is_op(node, aten.baddbmm):
            self._read_baddbmm(node)
        self.passed.append(node)
        return node

    def check_readers(self, softmax: fx.Node) -> None:
        """Refuse logits that something else reads: they would have to be computed beside the attention.

        Raises:
            UnsupportedError: names the reader.
        """
        known = {*self.passed, *self.readers, softmax}
        for node in self.passed[::-1]:
            for user in node.users:
                if user in known or reads_shape(user):
                    continue
                if not (g.is_op(user, aten.eq) and g.args(user)[1] == float("-inf")):
                    raise refuse(
                        softmax,
                        f"has logits that {g.where(user)} reads too ({user.target}), which a kernel does "
                        "not give; compute the logits without it, or sinks as one more column of the softmax",
                    )

    def _step(self, node: fx.Node) -> fx.Node:
        """Take one node in; returns the next one towards the product."""
        if g.is_op(node, *CASTS) and g.value(node).dtype not in FLOATS:
            raise refuse(node, f"casts the logits to {g.value(node).dtype}")
        if g.is_op(node, *CASTS, *COPIES) or (g.is_op(node, aten.dropout) and is_identity_dropout(node)):
            return source_node(node, 0)
        viewed = ax.before(node, self.dims)
        if viewed is not None:
            source, self.dims = viewed
            return source
        for part in (
            self._cap,
            self._factor,
            self._temperature,
            self._sinks,
            self._row_maximum,
            self._floor,
            self._mask,
        ):
            inner = part(node)
            if inner is not None:
                return inner
        raise refuse(node, f"applies {node.target} to the logits, which no kernel does")

    def _cap(self, node: fx.Node) -> fx.Node | None:
        """C * tanh(x / c) -> x."""
        outer = scalar_factor(node)
        tanh = skip(outer[0], *CASTS) if outer is not None else node
        if outer is None or not g.is_op(tanh, aten.tanh):
            return None
        inner = scalar_factor(skip(source_node(tanh, 0), *CASTS))
        if inner is None or abs(inner[1] * outer[1] - 1.0) > 1e-6:
            raise refuse(node, "has a tanh in the logits that is not c * tanh(x / c)")
        if self.logit_cap is not None or self.scale != 1.0 or self.temperatures:
            raise refuse(node, "caps the logits and scales them afterwards")
        self.logit_cap = outer[1]
        self.passed += _between(node, inner[0])
        return inner[0]

    def _factor(self, node: fx.Node) -> fx.Node | None:
        found = scalar_factor(node)
        if found is None:
            return None
        self.scale *= found[1]
        return found[0]

    def _temperature(self, node: fx.Node) -> fx.Node | None:
        """X * t or x / t -> x, where t is the same for all keys: it can be taken into the query."""
        is_quotient = g.is_op(node, aten.div) and len(node.args) == 2 and not node.kwargs
        if not is_quotient and not g.is_op(node, aten.mul):
            return None
        if not all(map(g.is_tensor, g.args(node)[:2])):
            return None
        for logits, factor in (g.args(node)[:2], g.args(node)[1::-1])[: 1 if is_quotient else 2]:
            if contains_product(factor) or not g.same_shape(g.shape(logits), g.shape(node)):
                continue
            dims = ax.aligned(g.shape(factor), self.dims)
            if g.value(factor).is_floating_point() and not set(self.keys) & set(ax.flat(dims)):
                self.temperatures.append((Operand(factor, dims), is_quotient))
                return logits
        return None

    def _sinks(self, node: fx.Node) -> fx.Node | None:
        """cat((logits, one column of sinks), keys) -> logits."""
        if not g.is_op(node, aten.cat):
            return None
        tensors, dim = g.args(node)[0], g.op_args(node)["dim"] % g.value(node).dim()
        if self.scale != 1.0 or self.logit_cap is not None or self.temperatures:
            raise refuse(node, "scales or caps its sinks together with the logits")
        if (
            len(tensors) != 2
            or ax.whole(self.dims)[dim] != self.keys
            or not Size.of(g.shape(tensors[1])[dim]).is_one
            or self.terms
        ):
            raise refuse(node, "concatenates something other than one column of sinks to the logits")
        self.sinks = sink_of_each_head(node, tensors[1], self.dims)
        (self.keys,) = ax.of_shape(g.shape(tensors[0])[dim : dim + 1])
        self.dims = (*self.dims[:dim], self.keys, *self.dims[dim + 1 :])
        return tensors[0]

    def _row_maximum(self, node: fx.Node) -> fx.Node | None:
        """X - max(x) -> x: a softmax does not change when a constant is taken from a row."""
        if not g.is_op(node, aten.sub, aten.sub_):
            return None
        maximum = skip(g.args(node)[1], aten.detach)
        if g.is_op(maximum, operator.getitem):
            maximum = source_node(maximum, 0)
        if not g.is_op(maximum, aten.max, aten.amax) or source_node(maximum, 0) is not source_node(node, 0):
            return None
        # One number a row: a maximum over the queries would move the keys against each other.
        shape = g.shape(g.args(node)[1])
        if self.keys in [dim for dim in ax.aligned(shape, self.dims) if dim]:
            return None
        self.readers.append(maximum)
        return source_node(node, 0)

    def _floor(self, node: fx.Node) -> fx.Node | None:
        """Max(x, c) -> x where c is so low that softmax takes it to zero."""
        if g.is_op(node, aten.max, aten.maximum, aten.clamp_min, aten.clamp_min_):
            logits, floor = (*g.args(node), None)[:2]
        elif g.is_op(node, aten.clamp, aten.clamp_) and g.op_args(node).get("max") is None:
            logits, floor = g.args(node)[0], g.op_args(node)["min"]
        else:
            return None
        return logits if _hides(floor, self.scale) and not self.temperatures else None

    def _mask(self, node: fx.Node) -> fx.Node | None:
        """masked_fill, where, an addition, or x * m + c * (1 - m) -> logits."""
        found = _hidden_keys(node, self.scale, self.dims)
        is_sum = g.is_op(node, aten.add, aten.add_, aten.sub, aten.sub_)
        if found is None and is_sum and all(map(g.is_tensor, g.args(node)[:2])):
            found = self._gated(node) or self._added(node)
        if found is None:
            return None
        if self.logit_cap is not None:
            raise refuse(node, "applies a mask before the logits are capped")
        if self.temperatures:
            raise refuse(
                node, "multiplies a mask by a tensor; multiply the logits before the mask is applied"
            )
        logits, term = found
        self.terms.append(term)
        return logits

    def _added(self, node: fx.Node) -> tuple[fx.Node, MaskTerm] | None:
        """(logits, term) of logits + term."""
        summands = _summands(node)
        for logits, term in (summands, summands[::-1]):
            if logits[1] == 1.0 and contains_product(logits[0]) and not contains_product(term[0]):
                return logits[0], MaskTerm(term[0], self.dims, factor=self.scale * term[1])
        return None

    def _gated(self, node: fx.Node) -> tuple[fx.Node, MaskTerm] | None:
        """(logits, m) of logits * m + c * (1 - m), where m is 0 or 1."""
        (gated, _), (penalty, weight) = _summands(node)
        if not g.is_op(gated, aten.mul, aten.mul_):
            return None
        scaled = scalar_factor(penalty) or (penalty, 1.0)
        gate = _complement(scaled[0])
        logits = [n for n in g.args(gated)[:2] if g.is_tensor(n) and gate is not None and not same(n, gate)]
        if len(logits) != 1 or gate is None or not is_zero_or_one(gate):
            return None
        if scaled[1] * weight * self.scale > masks.HIDDEN or not contains_product(logits[0]):
            return None
        self.passed.append(gated)
        return logits[0], MaskTerm(gate, self.dims, is_bool=True)

    def _read_baddbmm(self, node: fx.Node) -> None:
        """Beta * bias + alpha * product."""
        args = g.op_args(node)
        if args["beta"] != 0:
            if self.logit_cap is not None or self.temperatures:
                raise refuse(node, "adds a bias before the logits are capped or multiplied by a tensor")
            self.terms.append(MaskTerm(args["self"], self.dims, factor=self.scale * args["beta"]))
        self.scale *= args["alpha"]


def _summands(node: fx.Node) -> tuple[tuple[fx.Node, float], tuple[fx.Node, float]]:
    """The two terms of an addition or subtraction, each with its factor."""
    sign = -1.0 if g.is_op(node, aten.sub, aten.sub_) else 1.0
    return (source_node(node, 0), 1.0), (source_node(node, 1), sign * float(g.op_args(node)["alpha"]))


def _complement(node: fx.Node) -> fx.Node | None:
    """M of 1 - m."""
    if g.is_op(node, aten.rsub):
        inner, one, alpha = g.args(node)[0], g.args(node)[1], g.op_args(node).get("alpha", 1)
    elif g.is_op(node, aten.sub):
        (one, inner), alpha = g.args(node)[:2], g.op_args(node).get("alpha", 1)
    else:
        return None
    is_whole = g.is_tensor(inner) and alpha == 1 and constant_fill(one) == 1.0
    return inner if is_whole else None


def _between(last: fx.Node, first: fx.Node) -> list[fx.Node]:
    """The nodes after ``first`` through which ``last`` is computed from it by arguments."""
    return [node for node in g.ancestors(last, stop=lambda n: n is first or not n.args) if node is not first]


def _hidden_keys(node: fx.Node, factor: float, dims: Dims) -> tuple[fx.Node, MaskTerm] | None:
    """(logits, term) if the node sets logits to what, times ``factor``, softmax takes to zero."""
    if g.is_op(node, aten.masked_fill):
        logits, mask, fill = g.args(node)
        return (logits, MaskTerm(mask, dims, is_bool=True, hides=True)) if _hides(fill, factor) else None
    if g.is_op(node, aten.where) and len(node.args) == 3:
        condition, if_true, if_false = g.args(node)
        if _hides(if_false, factor) and g.is_tensor(if_true) and contains_product(if_true):
            return if_true, MaskTerm(condition, dims, is_bool=True)
        if _hides(if_true, factor) and g.is_tensor(if_false) and contains_product(if_false):
            return if_false, MaskTerm(condition, dims, is_bool=True, hides=True)
    return None


def _hides(fill: Any, factor: float) -> bool:
    value = None if fill is None else constant_fill(fill)
    return value is not None and value * factor <= masks.HIDDEN
